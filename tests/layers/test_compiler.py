import gc
import importlib
import weakref

import jax.numpy as jnp
import pytest

import aquant_jax as aq
from aquant_jax.layers import im2col
from aquant_jax.layers.compiler import Compiler
from tests.support.nets import images, small_net

spine = importlib.import_module("aquant_jax.quantize")


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


@pytest.mark.user_model
def test_a_shared_compiler_keeps_no_run_alive(monkeypatch):
    """Nor its cached activations, which can be gigabytes."""
    runs = []

    class Run(spine._Run):
        """Remembered weakly."""

        def __init__(self, *args):
            super().__init__(*args)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(spine, "_Run", Run)
    compiler = Compiler()
    aq.quantize(*small_net(), images(0, 8, size=5), aq.recipes.nearest(batch_size=8),
                progress=False, compiler=compiler)  # fmt: skip
    gc.collect()
    assert len(runs) == 1
    assert runs[0]() is None


@pytest.mark.user_model
def test_quantizing_runs_on_the_operations_of_the_compilers_backend():
    calls = []

    class Backend:
        """The definition, counted."""

        @staticmethod
        def convolve(*args):
            calls.append(args)
            return im2col.convolve(*args)

    recipe = aq.recipes.aquant(weight_bits=2, act_bits=2, border="constant", steps=1, batch_size=8)
    aq.quantize(*small_net(), images(0, 8, size=5), recipe, progress=False,
                compiler=Compiler(Backend))  # fmt: skip
    assert calls
