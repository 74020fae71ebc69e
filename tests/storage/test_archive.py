"""Folders that are whole or absent, and tell a flipped byte."""

import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from aquant_jax.errors import InputError
from aquant_jax.storage import archive, folder_lock
from tests.support.process import run_python

ARRAYS = {
    "codes": np.arange(10, dtype=np.uint8).reshape(2, 5) % 8,
    "scale": np.float32(0.5),
    "none": np.zeros((0, 3), np.float32),
    "half": jnp.ones(3, jnp.bfloat16),
    "numbers": np.array([np.nan, np.inf, -0.0]),
}
FACTS = {"recipe": {"steps": 3}}


def write(path, **fields):
    archive.write(path, ARRAYS, FACTS, {"program": b"abc"}, {"codes": 3}, **fields)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "saved")
    return tmp_path / "saved"


def test_everything_comes_back(folder):
    stored = archive.read(folder)
    assert stored.metadata == FACTS
    assert stored.files == {"program": b"abc"}
    assert stored.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        found, expected = stored.arrays[name], np.asarray(array)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.tobytes() == expected.tobytes()


def test_a_path_may_lead_back(folder):
    path = folder / ".." / "ü" / ".." / "other"
    (folder.parent / "ü").mkdir()
    write(path)
    assert archive.read(path).files == archive.read(folder).files


@pytest.mark.parametrize("name", ["[v1]", "v?", "v*", "v\\1"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="cannot be written: orbax takes no"):
        write(tmp_path / name / "saved")
    assert list(tmp_path.iterdir()) == []


def test_arrays_take_their_own_bytes(tmp_path):
    big = {"codes": np.random.default_rng(0).integers(0, 4, 400_000, dtype=np.uint8)}
    archive.write(tmp_path / "saved", big, {}, bits={"codes": 2})
    assert 100_000 < sum(archive.sizes(tmp_path / "saved").values()) < 105_000


def test_a_flipped_byte_of_any_file_is_told_and_named(folder):
    for name, size in archive.sizes(folder).items():
        file = folder / name
        whole = file.read_bytes()
        for position in {0, size // 3, size - 1}:
            flipped = bytearray(whole)
            flipped[position] ^= 4
            file.write_bytes(flipped)
            with pytest.raises(
                InputError,
                match=f"{re.escape(name)}.* damaged|not a checkpoint: {re.escape(name)}",
            ):
                archive.read(folder)
        file.write_bytes(whole)
    archive.read(folder)


def test_missing_and_foreign_files_are_told(folder):
    (folder / "program").rename(folder / "other")
    with pytest.raises(InputError, match=r"other does not belong to this checkpoint"):
        archive.read(folder)
    (folder / "other").unlink()
    with pytest.raises(InputError, match=r"saved/program is missing"):
        archive.read(folder)
    (folder / archive.MANIFEST).unlink()
    (folder / "link").symlink_to("elsewhere")  # as any other folder may have
    with pytest.raises(InputError, match=r"saved is not a checkpoint: manifest\.json"):
        archive.read(folder)


def test_what_is_there_stays(folder):
    before = archive.sizes(folder)
    with pytest.raises(InputError, match="already exists; nothing was written"):
        write(folder)
    assert archive.sizes(folder) == before


def test_what_a_killed_write_left_is_no_checkpoint_and_in_nobodys_way(folder):
    half = folder.with_name(".other.partial")
    folder.rename(half)
    (half / archive.MANIFEST).unlink()
    write(folder.with_name("other"))
    archive.read(folder.with_name("other"))
    assert not half.exists()


def test_two_processes_do_not_write_the_same_archive(folder):
    path = folder.with_name("other")
    with (
        folder_lock.lock(folder.with_name(".other.lock"), path),
        pytest.raises(InputError, match=f"other is in use by process {os.getpid()} on "),
    ):
        write(path)
    write(path)
    assert sorted(p.name for p in folder.parent.iterdir()) == sorted([folder.name, "other"])


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    # A limit on the size of files is what a full disk looks like without one.
    done = run_python(f"""
import pathlib, resource, signal
import numpy as np
from aquant_jax.storage import archive, folder_lock
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
path = pathlib.Path({str(tmp_path)!r}) / "saved"
noise = np.random.default_rng(0).integers(0, 256, 500_000, dtype=np.uint8)
try:
    archive.write(path, {{"codes": noise}}, {{}})
except archive.InputError as error:
    print(str(error).count("\\n"), error)
""")
    assert done.stdout.startswith(f"0 {tmp_path}/saved cannot be written: "), done.stderr
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file/saved cannot be written: Not a directory"):
        write(tmp_path / "file" / "saved")
    assert (tmp_path / "file").read_text() == "mine"
