"""`quantize` under JAX's configuration flags, and with arguments that it cannot use.

Each case gives the bits of a plain call, or an `InputError` that names the offender.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import aquant_jax as aq
from tests.support.nets import normal, rng_of

X = normal(rng_of(0), 16, 5, 2)
# One block with borders per tap, a learned step size and dropped elements.
RECIPE = aq.recipes.aquant(
    4, 4, steps=2, batch_size=8, quantize_input=True, blocks=("layer",), quant_drop_prob=0
)
NEAREST = aq.recipes.nearest(8, 8, batch_size=8)
COMPILER = aq.Compiler()


def variables():
    rng = rng_of(1)
    return {
        "layer0": {"kernel": normal(rng, 2, 2, 3), "bias": normal(rng, 1, 1, 3)},
        "layer1": {"kernel": normal(rng, 3, 4)},
        "shift": normal(rng, 1, 4),
    }


def apply(variables, x):
    first, last = variables["layer0"], variables["layer1"]
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x, first["kernel"], (1,), "VALID", dimension_numbers=numbers)
    h = jnp.mean(jax.nn.relu(y + first["bias"]), axis=1)
    return jnp.tanh(h @ last["kernel"]) + variables["shift"]


def quantize(recipe=RECIPE, v=None, x=X, function=apply, **options):
    options = {"observer": aq.Observer(), "compiler": COMPILER, **options}
    return aq.quantize(function, variables() if v is None else v, x, recipe, **options)


@functools.cache
def plain():
    quantized = quantize()
    return quantized, np.asarray(quantized(X))


def check_same(quantized, outputs):
    """The bits of a plain call."""
    jax.tree.map(np.testing.assert_array_equal, quantized.layers, plain()[0].layers)
    jax.tree.map(np.testing.assert_array_equal, quantized.activations, plain()[0].activations)
    dtypes = {a.dtype.name for a in jax.tree.leaves((quantized.layers, quantized.activations))}
    assert dtypes == {"uint8", "float32"}
    np.testing.assert_array_equal(outputs, plain()[1])


CONTEXTS = {
    "x64": functools.partial(jax.enable_x64, True),
    "debug_nans": functools.partial(jax.debug_nans, True),
    "strict": functools.partial(jax.numpy_dtype_promotion, "strict"),
    "rank": functools.partial(jax.numpy_rank_promotion, "raise"),
    "transfers": functools.partial(jax.transfer_guard, "disallow"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_flag_changes_no_bit(name, tmp_path):
    x = jax.device_put(X)
    plain()
    with CONTEXTS[name]():
        quantized = quantize()
        outputs = jax.device_get(quantized(x))
    check_same(quantized, outputs)
