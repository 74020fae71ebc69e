import gc

import jax
import jax.numpy as jnp

import aquant_jax as aq
from aquant_jax.layers.backend import ReferenceBackend
from aquant_jax.layers.compiler import Compiler
from tests.support.nets import images, small_net, two_convolutions


def test_a_function_is_built_once_a_key():
    compiler, built = Compiler(), []

    def build(factor):
        built.append(factor)
        return lambda x: factor * x

    one = compiler.get("a", lambda: build(2.0))
    assert compiler.get("a", lambda: build(5.0)) is one
    assert float(one(jnp.float32(3.0))) == 6.0
    assert float(compiler.get("b", lambda: build(5.0))(jnp.float32(3.0))) == 15.0
    assert built == [2.0, 5.0]


def test_a_shared_compiler_keeps_no_calibration_set_alive():
    """Nor the cached activations, which can be gigabytes."""
    compiler = Compiler()
    before = {id(array) for array in jax.live_arrays()}
    x = images(0, 64, size=5)
    quantized = aq.quantize(
        *small_net(), x, aq.recipes.nearest(batch_size=8),
        observer=aq.Observer(), compiler=compiler,
    )  # fmt: skip
    kept = {id(leaf) for leaf in jax.tree.leaves(quantized)} | before
    gc.collect()
    left = [array for array in jax.live_arrays() if id(array) not in kept]
    assert all(array.shape[:1] != (len(x),) for array in left)


def test_quantizing_runs_on_the_operations_of_the_compilers_backend():
    calls = []

    class Counted(ReferenceBackend):
        """The reference implementation, counted."""

        def convolve(self, *args):
            calls.append(args)
            return super().convolve(*args)

    recipe = aq.recipes.aquant(weight_bits=2, act_bits=2, border="constant", steps=1, batch_size=8)
    aq.quantize(
        *two_convolutions(), images(0, 8), recipe,
        observer=aq.Observer(), compiler=Compiler(Counted()),
    )  # fmt: skip
    assert calls
