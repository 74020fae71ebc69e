"""Strict promotion for our own code, the shared data folder, and one process's JAX settings."""

import gc
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import jax
import pytest
from packaging.version import Version

from tests.support import ir_contexts, typecheck
from tests.support.process import SHARED_DATA

typecheck.install()
ir_contexts.share()

COMPILED = pytest.StashKey[str]()
FUSION_EMITTERS = "0.11"  # from this version of jaxlib on there is no other way to emit a fusion

# The programs of tests are small: split into modules for many cores, they compile a fifth slower.
ONE_MODULE = "--xla_cpu_parallel_codegen_split_count=1"


def pytest_addoption(parser):
    parser.addoption(
        "--fast-compile",
        action="store_true",
        help="XLA optimizes no machine code: half the time, for tests that do not depend on it",
    )


def pytest_configure(config):
    """Programs that several workers, or processes that tests start, compile are compiled once."""
    fast = config.getoption("fast_compile")
    jax.config.update("jax_disable_most_optimizations", fast)
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    flags = [os.environ.get("XLA_FLAGS", ""), ONE_MODULE]
    if fast:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if Version(metadata.version("jaxlib")) < Version(FUSION_EMITTERS):
            flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    config.stash[COMPILED] = tempfile.mkdtemp(prefix="aquant-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[COMPILED]
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_sessionstart():
    """No test cuts the power, so nothing waits for the disk: 5 ms a file."""
    os.fsync = lambda descriptor: None


def pytest_collection_modifyitems(items):
    """Slow tests are those of benchmarks and of what seldom changes: `make test` has 12 minutes."""
    if not os.environ.get("AQUANT_SLOW_TESTS"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set AQUANT_SLOW_TESTS=1"))


def pytest_collection_finish(session):
    """The garbage collector looks at what is imported once, and seldom at the rest: it would take
    a fourteenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_unconfigure(config):
    """Nothing of it is left."""
    if COMPILED in config.stash:
        shutil.rmtree(config.stash[COMPILED], ignore_errors=True)


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
