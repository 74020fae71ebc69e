"""The CPU handlers under sanitizers: random calls, some that do not fit, some without memory."""

import os
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from tests.support.process import REPOSITORY

# How long each sanitizer looks for new calls; by default as long as a hundred seeds take.
SECONDS = os.environ.get("AQUANT_FUZZ_SECONDS", "1")
FLAGS = (
    "-std=c++17", "-O0", "-g1", "-march=native", "-ffp-contract=off", "-pthread", "-DVECTORISED=",
    "-DINLINED_LAMBDA=", "-DBORDER_INLINE=inline", "-D_GLIBCXX_ASSERTIONS",
    "-fno-sanitize-recover=all",
)  # fmt: skip
HANDLERS = {"img2col", "img2col_border", "border_columns", "border_columns_vjp", "border_conv",
            "border_conv_vjp", "conv_int8"}  # fmt: skip


def compiler_with(libraries):
    """The compiler; skips where it or one of its libraries is absent."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("needs g++")
    for library in libraries:
        name = f"-print-file-name=lib{library}.so"
        found = subprocess.run([compiler, name], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"needs g++ with lib{library}")
    return compiler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "libraries"),
    [("address,undefined", ("asan", "ubsan")), ("thread", ("tsan",))],
    ids=["address", "thread"],
)
def test_random_calls_are_clean(sanitizers, libraries, tmp_path):
    compiler = compiler_with(libraries)
    program = tmp_path / "fuzz"
    subprocess.run(
        [compiler, *FLAGS, f"-fsanitize={sanitizers}", f"-I{REPOSITORY}/gpu_ops/include",
         "-isystem", jax.ffi.include_dir(), f"{REPOSITORY}/tests/support/fuzz.cc", "-o", program],
        check=True,
    )  # fmt: skip
    done = subprocess.run([program, SECONDS], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(f"{sanitizers}: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr[:5000]
    counts = {name: map(int, rest) for name, *rest in map(str.split, done.stdout.splitlines())}
    assert counts.keys() == HANDLERS
    for name, (good, refused, exhausted) in counts.items():
        assert min(good, refused, exhausted) > 0, (name, done.stdout)
