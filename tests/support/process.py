"""Programs in processes of their own, and where the repository and the shared data are."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


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
