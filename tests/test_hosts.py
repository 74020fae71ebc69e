"""Several processes quantize together: same result, one error line, and a restart after a death."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from aquant_jax.arithmetic.range_search import BINS
from launch import quantize
from tests.support import two_processes
from tests.support.process import REPOSITORY

TENSORS, WORDS = 7, 2  # words of 32 bits, in a float64


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder, devices, *arguments):
    """A process of the program, on CPU devices."""
    return subprocess.Popen(
        [sys.executable, "-m", two_processes.__name__, f"--workdir={folder}", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    """Exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def run_two(folder, *arguments):
    """The ends of both processes."""
    common = (f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", *arguments)
    both = [start(folder, 2, f"--process={process}", *common) for process in range(2)]
    return [end(process) for process in both]


def found_in(folder, process=0):
    return json.loads((folder / f"{process}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """How two processes ended, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    ends = run_two(folder)
    assert [code for code, _, _ in ends] == [0, 0], ends
    return ends, [found_in(folder, process) for process in range(2)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process of as many devices found."""
    folder = tmp_path_factory.mktemp("one")
    code, _, err = end(start(folder, 4))
    assert code == 0, err
    return found_in(folder)


def test_codes_and_step_sizes_are_those_of_one_process(two, one):
    assert [found["codes"] for found in two[1]] == [one["codes"]] * 2
    assert two[1][0]["devices"] == [4, 4]
    one, *ranges = [found["ranges"] for found in (one, *two[1])]
    for found in ranges:
        assert found["quantizers"] == one["quantizers"]
        ends, bins = [TENSORS, 2 * WORDS], [TENSORS, 2, BINS * WORDS]
        assert found["sent"] == [[4], bins, ends]  # and results, one for each device
    for places in one["quantizers"].values():
        assert places == places[:1] * 3
    first, second = (np.array(found["counted"]).reshape(2, 3) for found in ranges)
    samples, everywhere, channels = np.transpose(first + second)  # of which each is counted once
    assert samples.tolist() == everywhere.tolist() == channels.tolist() == first[:, 1].tolist()
    assert second[:, [0, 2]].all()


def test_each_process_reads_its_share_of_the_samples(two, one):
    """To the codes, and the fingerprint, of one process that has read all of them."""
    expected, found = one["shares"], [found["shares"] for found in two[1]]
    assert [len(share["read"]) for share in found] == [12, 12]
    assert found[0]["read"] + found[1]["read"] == expected["read"]
    for share in found:
        for name in ("codes", "few", "fingerprint"):
            assert share[name] == expected[name]
        assert share["less"]["codes"] == expected["codes"]
        assert set(share["less"]["places"]) == {"disk"}


def test_all_read_the_blocks_that_the_first_has_written(two):
    for found in two[1]:
        assert found["again"] == {"codes": found["codes"], "devices": [4, 4]}
        assert found["learned"] == [2, 0]


def test_caches_that_do_not_fit_leave_the_devices_of_all(two):
    for found in two[1]:
        assert found["less"]["codes"] == found["codes"]
        assert set(found["less"]["places"]) == {"device", "disk"}


def test_only_the_first_prints(two):
    assert [out for _, out, _ in two[0]] == ["done\n", ""]
    assert [err for _, _, err in two[0]] == ["", ""]


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (
            "data",
            r"process 1 on HOST makes another call than process 0 on HOST: it differs in calib",
        ),
        ("recipe", r"it differs in recipe.reconstruction.steps (4 there, 8 here)"),
        ("code", "process 1 on HOST makes another call than process 0 on HOST: it differs in code"),
        ("nan", "process 1 on HOST: calibration has 132 of 132 values that are NaN or infinite"),
        (
            "share",
            "process 1 on HOST: calibration has 30 of 30 values that are NaN or "
            "infinite, the first in sample 10",
        ),
        (
            "folder",
            "elsewhere/1 is empty here, but not for process 0; the folder must be on a file",
        ),
        ("mesh", "--mesh=2 has 2 devices; the 2 processes have 4, and their mesh must have all"),
    ],
)
def test_what_differs_is_an_error_of_all(two, difference, message):
    for found in two[1]:
        assert message.replace("HOST", socket.gethostname()) in found["messages"][difference]


def test_a_mesh_without_this_process_is_an_error(two):
    expected = "mesh has devices of the processes [0] of 2; it must have those of one, or of all"
    assert two[1][1]["messages"]["part"] == expected


def test_the_failure_of_one_ends_all_with_one_line(tmp_path):
    first, second = run_two(tmp_path, "--fails")
    assert first == (2, "", f"error: process 1 on {socket.gethostname()}: no such weights\n")
    assert second == (2, "", "")


@pytest.mark.parametrize(
    "victim",
    [
        1,
        pytest.param(0, marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_all_and_the_rerun_resumes(tmp_path, victim):
    ends = run_two(tmp_path, f"--dies={victim}")
    assert ends[victim][0] < 0
    code, out, err = ends[1 - victim]
    assert (code, out) == (1, "")
    assert err.startswith(f"error: process {victim}")
    assert err.endswith("run the command again: it resumes after the last finished block\n")
    assert err.count("\n") == 1
    rerun = two_processes.run(None, tmp_path / "blocks", recipe=two_processes.NEAREST)
    assert rerun["devices"] == [4, 1]


@pytest.mark.slow
def test_a_coordinator_out_of_reach_is_one_line(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    flags = (f"--coordinator={address}", "--processes=2", "--process=1", "--connect_timeout=1")
    code, out, err = end(start(tmp_path, 1, *flags))
    assert (code, out) == (1, "")
    assert err == (
        f"error: process 1: no coordinator answered at {address} within 1 s, or not all 2 "
        f"processes came\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed"], "finds no cluster here; give --coordinator and --processes and"),
        (["--process=1"], "give --coordinator and --processes, or run it by Slurm or Open MPI"),
        (["--coordinator=x", "--processes=2", "--process=1"], "x: it must be HOST:PORT"),
        (["--coordinator=x:1", "--processes=2", "--process=2"], "count from 0"),
    ],
)
def test_flags_that_tell_no_place_are_an_error(flags, message, capsys, tmp_path):
    program = ["launch.quantize", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    assert quantize.main([*program, *flags]) == 2
    assert message in capsys.readouterr().err
