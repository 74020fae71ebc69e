"""Strict promotion for our own code, the shared data folder, and one process's JAX settings."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


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
