"""Golden codes: ``python -m tests.golden.regenerate`` writes them anew.

All inputs are multiples of powers of two, so every intermediate value is exact in float32 and the
files hold on any machine. A difference means that the meaning of a stored state has changed: bump
the format, or find the bug.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic.adaround import hard_codes, nearest_codes
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.graph.trace import trace
from aquant_jax.layers.fake_quant import LayerInput, LayerSpec, Weights, run_layer
from tests.support.layer_codes import input_codes

FOLDER = Path(__file__).parent
# name -> (kernel size, strides, padding, groups, border, phi, border granularity)
CASES = {
    "conv_fused": ((2, 2), (1, 1), ((1, 0), (0, 1)), 1, "quadratic", "clamp", "mean"),
    "conv_each": ((3, 3), (2, 1), ((1, 1), (1, 1)), 1, "quadratic", "clamp", "element"),
    "grouped": ((2, 4), (1, 2), ((0, 1), (2, 1)), 2, "linear", "identity", "mean"),
    "nearest": ((3, 3), (1, 1), ((1, 1), (1, 1)), 1, None, "clamp", "mean"),
    "conv_channel": ((3, 3), (2, 1), ((1, 1), (0, 2)), 1, "quadratic", "identity", "channel"),
}
POWERS = {"linear": ("b0", "b1"), "quadratic": ("b0", "b1", "b2"), None: ()}
STEP, ZERO, BITS = 0.25, 2.0, 3


def dyadic(rng, shape, denominator, limit):
    steps = rng.integers(-limit * denominator, limit * denominator + 1, shape)
    return (steps / denominator).astype(np.float32)


def inputs(name, seed):
    """What the case is made of; stored beside the results."""
    size, _, _, groups, border, _, granularity = CASES[name]
    rng = np.random.default_rng(seed)
    scales = {"b0": 16, "b1": 64, "b2": 512}
    taps = 1 if granularity == "channel" else int(np.prod(size))
    return {
        "x": dyadic(rng, (2, 5, 6, 4), 16, 2),
        "kernel": dyadic(rng, (*size, 4 // groups, 4), 8, 1),
        "bias": dyadic(rng, (4,), 8, 2),
        "weight_zero": rng.integers(0, 16, 4).astype(np.float32),
        "alpha": rng.normal(size=(*size, 4 // groups, 4)).astype(np.float32),
        **{
            b: (rng.integers(0, 9, (taps, 4)) / scales[b]).astype(np.float32)
            for b in POWERS[border]
        },
    }


def compute(name, given):
    """Codes of the input columns and of the weights, and the layer's output, under jit."""
    _, strides, padding, groups, border, phi, granularity = CASES[name]

    def apply(variables, x):
        return jax.lax.conv_general_dilated(
            x, variables["kernel"], strides, padding, feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    (op,) = trace(apply, {"kernel": given["kernel"]}, given["x"]).ops
    spec = LayerSpec("kernel", "conv", 4, "kernel", BITS, border, phi, granularity)
    state = ActivationQuantizer(jnp.float32(STEP), jnp.float32(ZERO))
    coefficients = {name: given[name] for name in POWERS[border]}
    units, zero = given["kernel"] * np.float32(8.0), given["weight_zero"].reshape(1, 1, 1, 4)
    codes = jax.jit(lambda *args: input_codes(op, spec, *args))
    layer = jax.jit(lambda *args: run_layer(op, spec, *args))
    weights = Weights(given["kernel"], given["bias"], coefficients)
    return {
        "input_codes": np.asarray(codes(given["x"], state, coefficients)),
        "nearest_codes": np.asarray(nearest_codes(units / 2, zero, 4), np.uint8),
        "hard_codes": np.asarray(hard_codes(units / 2, given["alpha"], zero, 4), np.uint8),
        "output": np.asarray(layer(LayerInput(given["x"], state), weights)),
    }


def main():
    for seed, name in enumerate(CASES):
        given = inputs(name, seed)
        np.savez_compressed(FOLDER / f"{name}.npz", **given, **compute(name, given))
        print(f"wrote {FOLDER / name}.npz")


if __name__ == "__main__":
    main()
