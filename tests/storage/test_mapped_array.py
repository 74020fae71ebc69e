"""Arrays in files without a name."""

import os

import numpy as np
import pytest

from aquant_jax.errors import InputError
from aquant_jax.storage.mapped_array import MappedArray


@pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.bool_])
def test_rows_are_read_as_written(tmp_path, shape, dtype):
    array = MappedArray(tmp_path, shape, dtype)
    values = (np.arange(np.prod(shape)).reshape(shape) % 3).astype(dtype)
    array[:3] = values[:3]
    array[3:5] = values[3:]
    np.testing.assert_array_equal(array[np.array([4, 0, 4])], values[[4, 0, 4]])
    np.testing.assert_array_equal(array.whole(), values)


def test_a_file_that_was_cut_is_an_error(tmp_path):
    array = MappedArray(tmp_path, (4, 8), np.int32)
    os.truncate(array._file.fileno(), 100)
    with pytest.raises(OSError, match="row 3 of 32 bytes is incomplete"):
        array[np.array([3])]


def test_nothing_is_left_in_the_folder(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    array = MappedArray(tmp_path, (5, 2), np.float32)
    assert not list(tmp_path.iterdir())
    del array
    assert len(os.listdir("/proc/self/fd")) == before


def test_space_is_taken_when_it_is_made(tmp_path):
    """A mapped file that cannot grow ends the process when it is written."""
    array = MappedArray(tmp_path, (1000, 1000), np.float32)
    assert os.fstat(array._file.fileno()).st_blocks * 512 >= array.nbytes


def test_an_empty_array(tmp_path):
    array = MappedArray(tmp_path, (4, 0), np.float32)
    array[:2] = np.zeros((2, 0), np.float32)
    assert array[np.array([1, 2])].shape == (2, 0)


def test_a_folder_is_made_where_one_can_be(tmp_path):
    MappedArray(tmp_path / "new", (1,), np.float32)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: 4 bytes of cached .*\(File exists\)"):
        MappedArray(tmp_path / "file", (1,), np.float32)
