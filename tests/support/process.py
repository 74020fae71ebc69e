"""Programs in processes of their own, what the workers of a run share, and where files are."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


def made_once(tmp_path_factory, name, make):
    """The folder that ``make(path)`` makes in one worker, for all of them; not to be written to."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / name).exists():
            make(base / name)
    return base / name


class PoolHere:
    """A pool of processes that calls in this one."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def apply(self, function, arguments):
        return function(*arguments)


def run_pools_here(monkeypatch, module):
    """What `module` gives to pools of processes runs in this process."""
    context = type("", (), {"Pool": PoolHere})
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda kind: context)


def run_python(program: str, **environment: str):
    """Runs a program in a process of its own, on CPUs."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
