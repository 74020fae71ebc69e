"""A launched run that is killed, whenever, ends with the codes of one that was not.

AQUANT_KILLS=20 pytest tests/launch/test_kill.py kills at as many random moments too.
"""

import os
import signal
import time

import numpy as np
import pytest

from aquant_jax.storage import archive
from launch import quantize
from tests.launch.conftest import DIGITS, SMALL
from tests.launch.processes import exit_code, start

KILLS = int(os.environ.get("AQUANT_KILLS", "0"))
LONGEST = 10  # seconds before a random kill; a run takes longer
# A run is in the middle of this when a file of that name exists.
MOMENTS = {
    "writing a block": "blocks/.002.partial",
    "writing the network": ".quantized.partial",
    "evaluation": "quantized",
}


def kill_when(path, condition, draws=True):
    """Starts a run and kills it; whether it was killed in time."""
    process = start(path, draws=draws)
    while process.is_alive() and not condition():
        time.sleep(0.0005)
    process.kill()
    return exit_code(process) == -signal.SIGKILL


def finish(path, draws=True):
    assert exit_code(start(path, draws=draws)) == 0
    return archive.read(path / "quantized")


@pytest.fixture
def uninterrupted(finished_run):
    """The network of a run that was not killed."""
    return archive.read(finished_run / "quantized")


def assert_same(one, two):
    for stored in (one, two):  # a program also says from where it was traced
        stored.metadata.pop("program_bytes", None)
    assert one.metadata == two.metadata
    assert one.arrays.keys() == two.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, two.arrays[name], err_msg=name)


@pytest.mark.parametrize(
    "moments", [["writing the network"], pytest.param([*MOMENTS], marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_of_everything(tmp_path, uninterrupted, moments):
    path = tmp_path / "run"
    for moment in moments:
        name = MOMENTS[moment]
        assert kill_when(path, (path / name).exists, draws=False), moment
        assert not (path / "results.json").exists(), moment
        for block in (path / "blocks").glob("[0-9]*"):
            archive.check(block)
    assert_same(finish(path, draws=False), uninterrupted)


@pytest.mark.skipif(not KILLS, reason="takes half a minute a kill: AQUANT_KILLS=20")
@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment(tmp_path, uninterrupted, seed):
    path = tmp_path / "run"
    end = time.monotonic() + np.random.default_rng(seed).uniform(0, LONGEST)
    assert kill_when(path, lambda: time.monotonic() > end)
    found = sorted(archive.sizes(path)) if path.exists() else []
    print(f"killed with {[name for name in found if 'arrays' not in name]}")
    assert_same(finish(path), uninterrupted)


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    argv = ["quantize", DIGITS, *SMALL, f"--workdir={tmp_path / 'file' / 'run'}"]
    assert quantize.main(argv) == 2
    assert "cannot be written" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
