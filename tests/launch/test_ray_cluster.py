"""``launch.sweep --executor=ray`` on a cluster of two CPUs, whose workers are killed and refused.

pip install -e '.[cluster]' && pytest tests/launch/test_ray_cluster.py
"""

import contextlib
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import time

import psutil
import pytest

from aquant_jax.storage import archive
from aquant_jax.storage.folder_lock import LOCK
from launch import sweep
from tests.launch.conftest import DIGITS, OPTAX, SMALL
from tests.launch.test_executors import results_of
from tests.launch.test_kill import assert_same
from tests.support.process import REPOSITORY

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="needs Ray, three minutes and six processes: pip install -e '.[cluster]'",
    ),
    OPTAX,
]
CELLS = [f"{preset}-s{seed}" for preset in ("qdrop", "aquant") for seed in (0, 1)]
TABLE = [DIGITS, "--presets=qdrop,aquant", "--seeds=0,1", *SMALL]
LONGEST = 300  # seconds of any sweep
HEAD = """
import sys, ray
head = ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
print(head.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The table by the local executor."""
    path = tmp_path_factory.mktemp("local")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        assert sweep.main(["sweep", *TABLE, f"--workdir={path}"]) == 0
    return path


@pytest.fixture(scope="module")
def cluster():
    """The environment of programs that run on a cluster of two CPUs, closed to everybody else."""
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # fmt: skip
    environment, pipe = os.environ | own, subprocess.PIPE
    command = [sys.executable, "-c", HEAD]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as head:
        yield environment | {"RAY_ADDRESS": head.stdout.readline().strip()}
        head.stdin.close()


def start(path, environment):
    command = [sys.executable, "-m", "launch.sweep", *TABLE, "--executor=ray", f"--workdir={path}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_until(there, process):
    end = time.monotonic() + LONGEST
    while not there() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    assert there(), process.communicate()


def assert_complete(path, process, local):
    """The sweep ended well, with the networks and the scores of the local one."""
    output, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    lines = [line for line in output.splitlines() if line.split("w2a2")[0] in ("qdrop ", "aquant ")]
    assert len(lines) == len(CELLS), output
    for cell in CELLS:
        assert_same(*(archive.read(folder / cell / "quantized") for folder in (path, local)))
    assert results_of(path) == results_of(local)
    return errors


def test_a_killed_workers_run_resumes_and_the_table_equals_the_local_one(tmp_path, cluster, local):
    process, victim = start(tmp_path, cluster), tmp_path / CELLS[0]
    wait_until((victim / "blocks" / "001").exists, process)
    worker = int((victim / LOCK).read_text().split()[1])
    os.kill(worker, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in victim.glob("blocks/[0-9]*/*")}
    errors = assert_complete(tmp_path, process, local)
    assert f"{CELLS[0]}: The worker died unexpectedly" in errors
    assert "Retry 1 of 3" in errors
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_an_error_of_a_run_is_one_line_and_what_the_others_finished_stays(tmp_path, cluster, local):
    process, foreign = start(tmp_path, cluster), tmp_path / CELLS[2]
    wait_until((tmp_path / CELLS[0] / "blocks" / "000").exists, process)  # two run, two wait
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 2
    last = errors.splitlines()[-1]
    assert last.startswith(f"error: {foreign} holds notes.txt of unknown origin")
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert list(tmp_path.glob("qdrop-s?/results.json"))
    assert (tmp_path / CELLS[0] / "blocks" / "000").exists()
    assert not list(tmp_path.glob(f"*/{LOCK}"))
    (foreign / "notes.txt").unlink()
    assert_complete(tmp_path, start(tmp_path, cluster), local)


def test_ctrl_c_cancels_the_runs_of_a_cluster_that_started_here(tmp_path, local):
    alone = os.environ | {"RAY_ADDRESS": ""}
    process = start(tmp_path, alone)
    wait_until((tmp_path / CELLS[0] / "blocks" / "000").exists, process)
    worker = int((tmp_path / CELLS[0] / LOCK).read_text().split()[1])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to all processes of the sweep
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("error: interrupted; the same command goes on")
    assert not list(tmp_path.glob(f"*/{LOCK}"))
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(worker).wait(timeout=30)
    assert_complete(tmp_path, start(tmp_path, alone), local)
