"""A launched run that is killed, whenever, ends with the codes of one that was not.

AQUANT_KILLS=20 pytest tests/test_kill.py kills at as many random moments too.
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from aquant_jax.storage import archive
from launch import quantize
from tests.support.process import REPOSITORY

KILLS = int(os.environ.get("AQUANT_KILLS", "0"))
ARGUMENTS = [
    "--config=configs/digits.py:w2a2", "--config.recipe.steps=20", "--config.calibration_size=64",
    "--config.recipe.init_samples=64", "--config.recipe.batch_size=8",
]  # fmt: skip
# What a run is in the middle of when a file of this name is there.
MOMENTS = {
    "writing a block": "blocks/.001.partial",
    "a step": "blocks/002",
    "writing the network": ".quantized.partial",
    "evaluation": "quantized",
}


def start(path):
    command = [sys.executable, "-m", "launch.quantize", *ARGUMENTS, f"--workdir={path}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=-3, stderr=-3)


def kill_when(path, condition):
    """Starts a run and kills it; whether it was killed in time."""
    run = start(path)
    while run.poll() is None and not condition():
        time.sleep(0.0005)
    run.send_signal(signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


def finish(path):
    assert start(path).wait() == 0
    return archive.read(path / "quantized")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its network, and how long it took."""
    path = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    return finish(path), time.monotonic() - began


def assert_same(one, two):
    assert one.facts == two.facts
    assert one.arrays.keys() == two.arrays.keys()
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, two.arrays[name], err_msg=name)


def test_killed_in_the_middle_of_everything(tmp_path, whole):
    path = tmp_path / "run"
    for moment, name in MOMENTS.items():
        assert kill_when(path, (path / name).exists), moment
        assert not (path / "results.json").exists(), moment
        for block in (path / "blocks").glob("[0-9]*"):
            archive.check(block)
    assert_same(finish(path), whole[0])


@pytest.mark.skipif(not KILLS, reason="takes half a minute a kill: AQUANT_KILLS=20")
@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment(tmp_path, whole, seed):
    path = tmp_path / "run"
    end = time.monotonic() + np.random.default_rng(seed).uniform(0, 0.9 * whole[1])
    assert kill_when(path, lambda: time.monotonic() > end)
    found = sorted(archive.sizes(path)) if path.exists() else []
    print(f"killed with {[name for name in found if 'arrays' not in name]}")
    assert_same(finish(path), whole[0])


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "file").write_text("mine")
    argv = ["quantize", *ARGUMENTS, f"--workdir={tmp_path / 'file' / 'run'}"]
    assert quantize.main(argv) == 2
    assert "cannot be written" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
