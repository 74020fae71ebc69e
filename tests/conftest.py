"""Strict promotion for our own code, the shared data folder, and one process's JAX settings."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
COMPILED = pytest.StashKey[str]()


def pytest_configure(config):
    """Programs that several workers, or processes that tests start, compile are compiled once."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    config.stash[COMPILED] = tempfile.mkdtemp(prefix="aquant-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[COMPILED]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_unconfigure(config):
    """Nothing of it is left."""
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)


def run_python(program: str, **environment: str):
    """Runs a program in a process of its own, on CPUs."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """Our code promotes no dtype and no rank silently; a user's model may (user_model)."""
    if request.node.get_closest_marker("user_model"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def shared_data() -> Path:
    """The folder with the real weights and data sets; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared data in {SHARED_DATA}")
    return SHARED_DATA
