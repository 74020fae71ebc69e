"""Times a deployed stack of transformer layers: rolled into a loop, and unrolled.

The layers are those of a `scan` over stacked weights, quantized to nearest at W8A8. Weights are
random, because times do not depend on them. "lower" and "compile" are seconds of one compilation,
"program" bytes of the serialized StableHLO, "ms" the medians of --rounds calls.

Example:

    python -m launch.bench.stack --out=stack.json
"""

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import lax

import aquant_jax as aq
import gpu_ops
from aquant_jax.deployment import stacked
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.deployment.stablehlo import export_program, serialize
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line

LAYERS = (4, 12, 48)
WIDTH, POSITIONS, HEADS, BATCH = 128, 32, 4, 8
FORMS = {"rolled": stacked.FEWEST_STEPS, "unrolled": sys.maxsize}  # fewest steps of a loop


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    timing.define_flags(values)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Layer norm without an offset."""
    centred = x - x.mean(-1, keepdims=True)
    return (
        centred * lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6) * scale[None, None]
    )


def layer(x: jax.Array, v: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    """One pre-norm transformer layer; x is ``[samples, positions, width]``."""
    heads = (*x.shape[:2], HEADS, -1)
    y = norm(x, v["norm1"])
    q, k, value = ((y @ v[name]).reshape(heads) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH / HEADS).astype(np.float32)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
    x = x + mixed.reshape(x.shape) @ v["out"]
    return x + jax.nn.gelu(norm(x, v["norm2"]) @ v["wi"]) @ v["wo"], None


def apply(variables: dict[str, Any], x: jax.Array) -> jax.Array:
    """The network: all layers, and a mean over the positions."""
    return lax.scan(layer, x, variables["layers"])[0].mean(1) @ variables["head"]


def weights(layers: int) -> dict[str, Any]:
    """Random weights of the network."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, shape[-2] ** -0.5, shape).astype(np.float32)

    wide = {name: normal(layers, WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    wide |= {"wi": normal(layers, WIDTH, 4 * WIDTH), "wo": normal(layers, 4 * WIDTH, WIDTH)}
    wide |= {name: np.ones((layers, WIDTH), np.float32) for name in ("norm1", "norm2")}
    return {"layers": wide, "head": normal(WIDTH, 10)}


def measure(rounds: int) -> dict[str, Any]:
    """All rows: each number of layers, rolled and unrolled."""
    x = np.random.default_rng(1).normal(size=(BATCH, POSITIONS, WIDTH)).astype(np.float32)
    rows = []
    for layers in LAYERS:
        start = time.perf_counter()
        recipe = aq.recipes.nearest(8, 8, batch_size=BATCH, quantize_input=True)
        network = aq.quantize(apply, weights(layers), x, recipe, observer=aq.Observer())
        seconds = time.perf_counter() - start
        for form in FORMS:
            rows.append({"layers": layers, "form": form, "quantize": seconds})
            stored = network if form == "rolled" else jax.device_put(network.on_host())
            rows[-1] |= measure_one(stored, x, form, rounds)
    shape = {"width": WIDTH, "positions": POSITIONS, "heads": HEADS, "batch": BATCH}
    return {"benchmark": "stack", **shape, "rounds": rounds, "rows": rows, **environment()}


def measure_one(network: Quantized, x: np.ndarray, form: str, rounds: int) -> dict[str, Any]:
    """Compilation, size and time of one network."""
    stacked.FEWEST_STEPS = FORMS[form]
    jax.clear_caches()  # the trace of the other form
    try:
        row: dict[str, Any] = {"program": len(serialize(export_program(network)))}
        calls = {}
        for name, backend in (("reference", None), ("int8", gpu_ops.backend())):
            begin = time.perf_counter()
            lowered = jax.jit(lambda network, x: network(x)).lower(network.with_backend(backend), x)
            middle = time.perf_counter()
            run = lowered.compile()
            row[name] = {"lower": middle - begin, "compile": time.perf_counter() - middle}
            calls[name] = functools.partial(run, network.with_backend(backend), x)
        for name, times in timing.milliseconds(calls, rounds).items():
            row[name]["ms"] = timing.summary(times)
    finally:
        stacked.FEWEST_STEPS = FORMS["rolled"]
    return row


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    timing.report(measure(values.rounds), values.out)


if __name__ == "__main__":
    sys.exit(main())
