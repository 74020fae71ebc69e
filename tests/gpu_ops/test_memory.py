"""Scratch memory of the CPU handlers: too little of it is an error, and few bytes need little."""

import functools
import json
import sys

import pytest

from tests.support.process import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a limited address space")

LIMITS = [4, 40, 100, 200, 4000]
# `outcomes` runs a call with so many megabytes more of address space than there is now. The outcome
# is the sums of its results, or the message of its error.
LIMITED = """
import json, resource
import jax, jax.numpy as jnp
import gpu_ops
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.layers.column import Rounding

ONE = ActivationQuantizer(jnp.float32(1), jnp.float32(0))

def outcome(run, megabytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        return [float(jnp.sum(value)) for value in jax.tree.leaves(run())]
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # as JAX has it
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

def outcomes(run, limits):
    outcome(run, 4096)  # compiles, and starts the threads
    print(json.dumps([outcome(run, limit) for limit in limits]))

def convolution(images, size, kernel, outputs):
    taps = kernel**2
    x, weights = jnp.ones((images, size, size, 1)), jnp.ones((taps, outputs))
    geometry = gpu_ops.conv_geometry(x.shape, (kernel, kernel), padding="VALID")
    border = {"b0": jnp.full((taps, 1), 0.5)}
    rounding = Rounding(4, "constant", "clamp", True)
    def run(x, weights):
        return jnp.sum(gpu_ops.border_conv(x, None, ONE, border, weights, geometry, rounding))
    return run, x, weights
"""
# Four tasks of 82 MB each: a line of zero padding is as long as the padding says. And four tasks of
# 24 MB each, with a kernel of 10 MB, twice.
SCARCE = """
x = jnp.ones((4, 1, 1, 32))
geometry = gpu_ops.conv_geometry(
    x.shape, (2, 2), dilation=(800, 800), padding=((400, 400), (400, 400)))
run = jax.jit(lambda: gpu_ops.img2col_border(x, ONE, {}, Rounding(4), geometry))
outcomes(run, LIMITS)
loss, x, weights = convolution(4, 400, 400, 16)
gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
outcomes(lambda: gradient(x, weights), LIMITS)
"""
# Its columns have a million elements; 24 pixels at a time took 900 MB.
WIDE = """
loss, x, weights = convolution(1, 1004, 1000, 1)
call = jax.jit(loss)
outcomes(lambda: call(x, weights), [300])
"""


@functools.cache
def measured(threads):
    """The outcomes of the calls above, one line each."""
    program = f"LIMITS = {LIMITS}{LIMITED}{SCARCE}{WIDE if threads == 1 else ''}"
    # glibc has address space in reserve for each thread, and keeps what is freed: 4 MB may do.
    glibc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = run_python(program, NPROC=str(threads), **glibc)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("call", [0, 1], ids=["img2col_border", "border_conv"])
def test_memory_that_runs_out_is_an_error_of_the_call(call, threads):
    *short, whole = measured(threads)[call]
    assert isinstance(whole, list)
    assert isinstance(short[0], str)
    for found in short:
        assert found == whole or found.startswith("RESOURCE_EXHAUSTED: "), found
    assert any("gpu_ops: out of memory" in found for found in short), short


def test_scratch_of_a_large_kernel_is_bounded():
    assert measured(1)[2] == [[25e6]]
