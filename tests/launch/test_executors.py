"""``launch.sweep --executor=ray`` without Ray: a stand-in runs tasks here and loses workers.

tests/launch/test_ray_cluster.py has the same with Ray.
"""

import contextlib
import json
import os
import pickle
import sys
from types import SimpleNamespace

import pytest

from aquant_jax.errors import InputError
from aquant_jax.storage.environment import environment
from aquant_jax.storage.folder_lock import FolderInUseError, hold
from launch import sweep
from launch.lib import cells, process, ray_cluster
from tests.launch.conftest import DIGITS
from tests.launch.test_sweep import FEW

TABLE = [DIGITS, "--presets=nearest,aquant", "--seeds=0,1", *FEW]


class RayError(Exception):
    """Its worker died."""


class RayTaskError(RayError):
    """A task raised ``cause``."""

    def __init__(self, cause):
        self.cause = cause


class StandIn:
    """A Ray that runs the last task first, in this process, and loses the workers of ``deaths``."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self):
        self.resources, self.deaths, self.stuck = {"CPU": 2.0}, {}, set()
        self.submitted, self.cancelled, self.options, self.connected = [], [], None, []

    def init(self, address, **_):
        self.connected.append(address)

    def shutdown(self):
        self.connected.pop()

    def nodes(self):
        return [
            {"Alive": True, "Resources": self.resources},
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        ]

    def remote(self, **_):
        return lambda function: SimpleNamespace(options=lambda **given: self._task(function, given))

    def _task(self, function, given):
        self.options = given

        def submit(*args):
            self.submitted.append(args[0].path.name)
            return len(self.submitted), function, pickle.dumps(args)

        return SimpleNamespace(remote=submit)

    def wait(self, tasks, num_returns=1, timeout=None):
        done = [task for task in tasks if timeout is None or task[0] not in self.stuck]
        return done[-num_returns:], [task for task in tasks if task not in done]

    def get(self, task):
        run, tasks = pickle.loads(task[2])
        if self.deaths.get(run.path.name, 0):
            self.deaths[run.path.name] -= 1
            raise RayError("it was killed\nby somebody")
        try:
            return task[1](run, tasks)
        except Exception as error:
            raise RayTaskError(pickle.loads(pickle.dumps(error))) from None

    def cancel(self, task, force=False):
        self.cancelled.append((task[0], force))


@pytest.fixture
def ray(monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": "cpu", "HOME": os.environ["HOME"]})
    monkeypatch.setitem(sys.modules, "ray", stand_in := StandIn())
    return stand_in


def sweep_by(executor, path, *flags):
    return sweep.main(["sweep", *TABLE, f"--executor={executor}", f"--workdir={path}", *flags])


def results_of(path):
    """Of a sweep, without its times; as text, which has an order."""
    results = json.loads((path / "results.json").read_text())
    rows = [{name: row[name] for name in row if name != "seconds"} for row in results["rows"]]
    return json.dumps([rows, results["device"], results["versions"]])


def test_the_table_is_that_of_the_local_executor(pretend, ray, tmp_path, capsys):
    assert sweep_by("local", tmp_path / "local") == 0
    assert sweep_by("ray", tmp_path / "ray") == 0
    assert ray.submitted == ["nearest-s0", "nearest-s1", "aquant-s0", "aquant-s1"]
    assert (found := results_of(tmp_path / "ray")) == results_of(tmp_path / "local")
    assert json.dumps(environment()["versions"]) in found
    files = [sorted(p.relative_to(top) for p in top.rglob("*")) for top in tmp_path.iterdir()]
    assert files[0] == files[1]
    # The local executor takes over what the cluster left, and the cluster gets only the new seed.
    runs = len(pretend)
    assert sweep_by("local", tmp_path / "ray") == 0
    assert len(pretend) == runs
    assert sweep_by("ray", tmp_path / "ray", "--seeds=0,1,2") == 0
    assert ray.submitted[4:] == ["nearest-s2", "aquant-s2"]
    assert results_of(tmp_path / "ray").count('"2": {"') == 2
    assert ray.connected == []


def test_a_run_whose_worker_died_is_submitted_again(pretend, ray, tmp_path, capsys):
    ray.deaths = {"nearest-s1": ray_cluster.RETRIES}
    assert sweep_by("ray", tmp_path) == 0
    assert ray.submitted.count("nearest-s1") == 1 + ray_cluster.RETRIES
    errors = capsys.readouterr().err
    assert all(f"nearest-s1: it was killed Retry {n} of 3" in errors for n in (1, 2, 3))


def test_a_worker_that_always_dies_ends_the_sweep_and_the_other_runs(
    pretend, ray, tmp_path, capsys
):
    ray.deaths, ray.stuck = {"aquant-s0": 9}, {1}
    assert sweep_by("ray", tmp_path) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: aquant-s0: its worker died 4 times, at last by: it was killed"
    assert (tmp_path / "aquant-s1" / "results.json").exists()
    # What ended is asked to end in its own time, and then made to.
    assert ray.cancelled == [(1, False), (2, False), (1, True)]


def test_an_error_of_a_run_is_its_one_line(pretend, ray, tmp_path, capsys, monkeypatch):
    assert sweep_by("ray", tmp_path) == 0
    for name in ("nearest-s0", "aquant-s0", "aquant-s1"):
        (tmp_path / name / "results.json").unlink()
    monkeypatch.setattr(ray_cluster, "FREED", 0.0)
    with hold(tmp_path / "aquant-s0", lambda: None):
        assert sweep_by("ray", tmp_path) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f"error: {tmp_path / 'aquant-s0'} is in use by process")
    assert sum("error" in line for line in errors) == 1
    assert (tmp_path / "aquant-s1" / "results.json").exists()
    assert not (tmp_path / "nearest-s0" / "results.json").exists()
    assert ray.cancelled == [(5, False)]
    assert ray.connected == []


def test_a_run_waits_for_a_worker_that_still_dies(monkeypatch, tmp_path):
    """Its folder is freed while the next worker sleeps; its command is that of the driver."""
    cell = cells.Cell("nearest", "spec", None)
    run = ray_cluster.Run(tmp_path, cell, 0)
    tasks = ray_cluster.Tasks("local", 1, 0, None, "~", command="python -m launch.sweep --typed")
    monkeypatch.setattr(cells, "run", lambda folder, *_: held(folder))
    process.keep_command(None)
    with contextlib.ExitStack() as dying:

        def held(folder):
            with hold(folder / "nearest-s0", lambda: None):
                return {"nearest": [process.command()]}

        dying.enter_context(hold(run.path, lambda: None))
        with pytest.raises(FolderInUseError):
            held(tmp_path)
        monkeypatch.setattr(ray_cluster.time, "sleep", lambda _: dying.close())
        assert ray_cluster.run_in_worker(run, tasks) == "python -m launch.sweep --typed"


def refuse(run, tasks):
    raise InputError("nothing is run")


@pytest.mark.parametrize(
    ("flags", "resources", "cpus", "gpus", "visible"),
    [
        ([], {"CPU": 2.0}, 1, 0, None),
        (["--cpus_per_cell=2"], {"CPU": 2.0}, 2, 0, None),
        ([], {"CPU": 8.0, "GPU": 4.0}, 1, 1, None),
        (["--mesh=2x2"], {"CPU": 8.0, "GPU": 4.0}, 1, 4, None),
        (["--gpus_per_cell=3"], {"CPU": 8.0, "GPU": 4.0}, 1, 3, None),
        (["--gpus_per_cell=0"], {"CPU": 8.0, "GPU": 4.0}, 1, 0, ""),
    ],
)
def test_a_task_gets_its_devices_and_the_settings_of_jax(
    flags, resources, cpus, gpus, visible, ray, tmp_path, monkeypatch
):
    monkeypatch.setattr(ray_cluster, "run_in_worker", refuse)
    ray.resources, os.environ["XLA_FLAGS"] = resources, "--xla_flag"
    os.environ |= {"CUDA_VISIBLE_DEVICES": "5", "SECRET": "word", "PYTHONPATH": "/mine"}
    assert sweep_by("ray", tmp_path, *flags) == 2
    assert (ray.options["num_cpus"], ray.options["num_gpus"]) == (cpus, gpus)
    environment = dict(ray.options["runtime_env"]["env_vars"])
    assert environment.pop("CUDA_VISIBLE_DEVICES", None) == visible
    assert environment.pop("PYTHONPATH") == f"{os.getcwd()}:/mine"
    assert environment == {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_flag"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--executor=local", "--cpus_per_cell=1"], "--cpus_per_cell belongs to --executor=ray"),
        (["--executor=local", "--gpus_per_cell=0"], "--gpus_per_cell belongs to --executor=ray"),
        (["--executor=local", "--ray_address=auto"], "--ray_address belongs to --executor=ray"),
        (["--cpus_per_cell=0"], "--cpus_per_cell=0: 0 is not a positive integer"),
        (["--mesh=4x2", "--gpus_per_cell=4"], "--mesh=4x2 needs 8 devices, and --gpus_per_cell=4"),
        (["--mesh=2x"], "--mesh=2x: it must be a number"),
        (["--mesh=2"], "--mesh=2 needs 2 devices, and JAX has 1 (cpu)"),
        (["--cpus_per_cell=3"], "no node has the 3 CPUs and 0 GPUs of a cell; nodes have 2 and 0"),
        (["--gpus_per_cell=1"], "no node has the 1 CPUs and 1 GPUs of a cell; nodes have 2 and 0"),
        (["--ray_address=127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1: Connection refused"),
    ],
)
def test_what_cannot_run_is_one_line_and_leaves_nothing(flags, words, ray, tmp_path, capsys):
    assert sweep_by("ray", tmp_path / "run", *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_extra_is_named(ray, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep_by("ray", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error == "error: --executor=ray needs Ray: pip install -e '.[cluster]' in the clone\n"
    assert list(tmp_path.iterdir()) == []
