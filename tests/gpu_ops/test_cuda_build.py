"""Package options: with and without nvcc; and that CUDA contracts nothing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import jax
import pytest

from tests.support.process import REPOSITORY

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="needs nvcc, which is not on PATH")
ALL = {"sm_75", "sm_80", "sm_89", "sm_90", "compute_90"}


def run(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=REPOSITORY
    )


@pytest.fixture
def configure(tmp_path):
    """Runs CMake on the checkout; the build folder is ``configure.folder``."""
    if not shutil.which("cmake") or not importlib.util.find_spec("pybind11"):
        pytest.skip("needs cmake and pybind11, which pip otherwise installs for the build alone")
    import pybind11

    def configured(option, archs="NATIVE", **environment):
        return run(
            "cmake", "-S", ".", "-B", str(tmp_path), f"-DGPU_OPS_CUDA={option}",
            f"-DGPU_OPS_CUDA_ARCHS={archs}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            **environment,
        )  # fmt: skip

    configured.folder = tmp_path
    return configured


@pytest.fixture
def no_nvcc(tmp_path_factory):
    """Environment variables under which nvcc is not found."""
    hidden = tmp_path_factory.mktemp("bin")
    for name in ("cmake", "g++", "c++", "cc", "gcc", "ld", "ar", "as", "ranlib", "strip", "make",
                 "ninja", "uname", "sh"):  # fmt: skip
        if found := shutil.which(name):
            (hidden / name).symlink_to(found)
    return {"PATH": str(hidden), "CUDACXX": "", "CUDA_PATH": ""}


def targets(folder):
    done = run("cmake", "--build", str(folder), "--target", "help")
    return {name for name in ("_cpu", "_cuda") if re.search(rf"\b{name}\b", done.stdout)}


def test_on_without_nvcc_is_an_error_that_says_so(configure, no_nvcc):
    done = configure("ON", **no_nvcc)
    assert done.returncode != 0
    assert "GPU_OPS_CUDA is ON, but no nvcc" in " ".join(done.stderr.split())


def test_auto_without_nvcc_is_the_cpu_alone(configure, no_nvcc):
    done = configure("AUTO", **no_nvcc)
    assert done.returncode == 0, done.stderr
    assert targets(configure.folder) == {"_cpu"}


def test_off_is_the_cpu_alone(configure):
    done = configure("OFF")
    assert done.returncode == 0, done.stderr
    assert targets(configure.folder) == {"_cpu"}


def test_another_word_is_an_error(configure):
    done = configure("YES")
    assert done.returncode != 0
    assert "GPU_OPS_CUDA is YES, not ON, OFF or AUTO" in " ".join(done.stderr.split())


@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "message"),
    [
        ("80,65", "GPU_OPS_CUDA_ARCHS has 65, which nvcc .* does not know; it knows .*75 80 .*90"),
        ("sm_90", "GPU_OPS_CUDA_ARCHS has sm_90, which nvcc .* ALL and NATIVE are possible"),
        ("", "GPU_OPS_CUDA_ARCHS is empty"),
    ],
)
def test_an_architecture_that_nvcc_does_not_know_is_an_error(configure, archs, message):
    done = configure("ON", archs)
    assert done.returncode != 0
    assert re.search(message, " ".join(done.stderr.split()))


def compiled_for(configure):
    """What the GPU module would be compiled for."""
    build = (configure.folder / "gpu_ops" / "CMakeFiles" / "_cuda.dir" / "flags.make").read_text()
    return set(re.findall(r"code=(\w+_\d+)", build))


def fake_smi(folder, *capabilities):
    """PATH on which nvidia-smi finds GPUs of these compute capabilities, or fails."""
    script = folder / "nvidia-smi"
    lines = "\\n".join(capabilities)
    script.write_text(f"#!/bin/sh\nprintf '{lines}\\n'\nexit {0 if capabilities else 9}\n")
    script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@needs_nvcc
@pytest.mark.parametrize(
    ("archs", "gpus", "expected"),
    [
        ("NATIVE", ["7.5", "9.0", "7.5"], {"sm_75", "sm_90", "compute_90"}),
        ("NATIVE", [], ALL),
        ("ALL", ["9.0"], ALL),
        ("120, 89", ["9.0"], {"sm_89", "sm_120", "compute_120"}),
    ],
)
def test_the_gpus_that_are_there_decide_by_default(
    configure, tmp_path_factory, archs, gpus, expected
):
    done = configure("ON", archs, **fake_smi(tmp_path_factory.mktemp("smi"), *gpus))
    assert done.returncode == 0, done.stderr
    assert compiled_for(configure) == expected


@needs_nvcc
def test_cuda_compiles_for_every_architecture_and_imports_without_a_gpu(configure):
    done = configure("ON", "ALL")
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", str(configure.folder), "--target", "_cuda", "-j2", "-v")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert compiled_for(configure) == ALL
    assert "use_fast_math" not in done.stdout
    module = next((configure.folder / "gpu_ops").glob("_cuda*.so"))
    assert "libcudart" not in run("ldd", str(module)).stdout
    folder = str(module.parent)
    names = "import _cuda; print(*sorted(_cuda.handlers()))"
    program = f"import sys; sys.path.insert(0, {folder!r}); {names}"
    found = run(sys.executable, "-c", program).stdout.split()
    built = ("border_columns", "border_columns_vjp", "conv_int8", "conv_tuned", "img2col",
             "img2col_border")  # fmt: skip
    assert found == [f"gpu_ops_{name}" for name in built]


@needs_nvcc
@pytest.mark.parametrize("source", ["img2col", "conv_int8"])
def test_no_product_is_contracted_and_subnormals_are_flushed(tmp_path, source):
    sources = REPOSITORY / "gpu_ops"
    written = (sources / "CMakeLists.txt").read_text()
    flags = re.search(r"COMPILE_LANGUAGE:CUDA>:(.*?);\$", written)
    done = run(
        "nvcc", "-std=c++17", *flags[1].split(";"), "-arch=compute_90", "-ptx",
        f"-I{sources}/include", "-isystem", jax.ffi.include_dir(), f"{sources}/cuda/{source}.cu",
        "-o", f"{tmp_path}/a.ptx",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "a.ptx").read_text()
    operations = set(re.findall(r"\b(?:fma|mad|mul|add|sub|rcp)\.[a-z.]*f32", ptx))
    assert operations == {f"{name}.rn.ftz.f32" for name in ("mul", "add", "sub", "rcp")}
    multiplied = set(re.findall(r"\bmma\.[a-z0-9.]*", ptx))
    expected = {"mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"}
    assert multiplied == (expected if source == "conv_int8" else set())
