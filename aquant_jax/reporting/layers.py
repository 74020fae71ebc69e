"""The layers of a network as plain data: their grids, borders, histograms and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Shaped

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.array_types import AnyArray
from aquant_jax.arithmetic.uniform import to_units
from aquant_jax.deployment.layer_summary import LayerSummary
from aquant_jax.deployment.quantized import Quantized, Traced
from aquant_jax.errors import InputError
from aquant_jax.graph.fold import Folded, folded_weights
from aquant_jax.graph.ir import Op
from aquant_jax.layers.fake_quant import (
    LayerInput,
    LayerSpec,
    LayerState,
    Weights,
    per_channel,
    run_layer,
)
from aquant_jax.layers.integer import run_deployed_layer

BINS = 64
POINTS = 33  # of a border's curve
CURVES = 8  # borders of a layer: those that bend the most
MARGIN = 0.25  # of the grid's range, beyond either end of a histogram
Record = dict[str, Any]


@jax.transfer_guard("allow")
def layer_records(quantized: Quantized, inputs: Any = None, variables: Any = None) -> list[Record]:
    """One JSON-able mapping for every layer.

    Args:
      quantized: the network.
      inputs: a batch, for the histograms of activations; None leaves them out.
      variables: of the float network, for the histograms of float weights and the error of every
        layer; None leaves them out. They need `inputs`.

    Returns:
      The fields of `LayerSummary` that are one value each, and

      - ``border_curves``: ``u`` and the borders ``B(u)`` that bend the most;
      - ``codes``: how many weights have each code;
      - ``weights``, ``activations``: counts in `BINS` bins of ``low`` to ``high``, in codes;
      - ``error``: ``|y' - y|^2 / |y|^2`` of the layer's output on its deployed input, against
        float weights and an input that is not rounded.

    Raises:
      InputError: inputs for a restored network, which can no longer be traced; variables alone.
    """
    quantized = quantized.on_host()  # one process may hold no more of a mesh than its own devices
    measured: Mapping[str, Record] = {}
    if inputs is not None:
        measured = _measure(quantized, inputs, variables)
    elif variables is not None:
        raise InputError("the errors of layers need inputs besides the variables")
    return [_record(layer) | measured.get(layer.path, {}) for layer in quantized.summary()]


def _record(layer: LayerSummary) -> Record:
    names = ("path", "kind", "weight_bits", "act_bits", "step_size", "zero_point")
    found: Record = {name: getattr(layer, name) for name in names}
    found |= {"shape": list(layer.shape), "border": layer.border and layer.border_function}
    found["border_granularity"] = layer.border_granularity if layer.border else None
    if layer.weight_bits is not None:
        found["codes"] = np.bincount(layer.codes.ravel(), minlength=2**layer.weight_bits).tolist()
    if layer.border and layer.act_bits and layer.zero_point is not None:
        found["border_curves"] = _border_record(layer)
    return found


def _border_record(layer: LayerSummary) -> Record:
    """The curves, the largest ``|B - 0.5|`` and the number of coefficients."""
    assert layer.border
    u, curves = border_curves(layer, POINTS)
    return {
        "u": u.tolist(),
        "curves": np.round(curves.astype(np.float64), 4).tolist(),
        "bend": float(np.max(np.abs(curves[0] - 0.5))),
        "coefficients": sum(int(c.size) for c in layer.border.values()),
    }


def border_curves(layer: LayerSummary, points: int) -> tuple[np.ndarray, np.ndarray]:
    """``u`` over the grid of a layer with a border, and the `CURVES` borders that bend the most.

    Args:
      layer: with quantized activations and a border.
      points: of a curve.

    Returns:
      [points] and [curves, points], those that bend more first.
    """
    assert layer.border
    assert layer.border_function
    assert layer.act_bits
    top = 2**layer.act_bits - 1
    u = np.linspace(0, top, points, dtype=np.float32) - np.float32(layer.zero_point)
    curves = border_values(
        layer.border_function, layer.border, layer.phi, layer.border_granularity, u
    )
    bend = np.max(np.abs(curves - 0.5), axis=1)
    return u, curves[np.argsort(-bend)[:CURVES]]


def border_values(
    name: str, coefficients: Mapping[str, Any], phi: str, granularity: str, u: np.ndarray
) -> np.ndarray:
    """Evaluates learned borders where every tap sees the same u.

    Args:
      name: of the border function.
      coefficients: arrays [taps, channels], as in ``LayerSummary.border``.
      phi: its name.
      granularity: see ``Recipe.border_granularity``.
      u: [points].

    Returns:
      [taps * channels, points] for "element", else [channels, points].
    """
    rows: Any = {
        key: np.asarray(value, np.float32)[:, None, :] for key, value in coefficients.items()
    }
    taps, _, channels = next(iter(rows.values())).shape
    columns = np.broadcast_to(np.asarray(u, np.float32)[:, None], (len(u), channels))
    values = borders.borders(name, phi, granularity == "mean", rows, [columns] * taps)
    return np.concatenate([np.asarray(value).T for value in values])


def _measure(quantized: Quantized, inputs: Any, variables: Any) -> dict[str, Record]:
    """Histograms and errors by layer, in one program. Layers in rolled loops have none."""
    program = quantized.program
    if not isinstance(program, Traced):
        raise InputError("a restored network has no histograms of activations: leave out inputs")
    folded: dict[str, Folded] = {}
    if variables is not None:
        folded = folded_weights(program.graph(quantized, variables, inputs), variables)
    quantized = quantized.with_backend(None)

    def measure(network: Quantized, x: Any, weights: Mapping[str, Folded]) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def layer(op: Op, spec: LayerSpec, given: LayerInput, state: LayerState) -> Array:
            y = run_deployed_layer(op, spec, given, state)
            if op.loop is None:
                found[spec.path] = _of_layer(op, spec, given, state, weights.get(spec.path), y)
            return y

        program.run(network, x, layer)
        return found

    arrays = jax.jit(measure)(quantized, inputs, folded)
    bits = {spec.path: (spec.weight_bits, spec.act_bits) for spec in quantized.specs}
    return {path: _plain(found, *bits[path]) for path, found in arrays.items()}


def _of_layer(
    op: Op,
    spec: LayerSpec,
    given: LayerInput,
    state: LayerState,
    folded: Folded | None,
    y: Shaped[Array, "..."],
) -> dict[str, Array]:
    found = {}
    if given.quantizer is not None:
        units = to_units(given.x, 1.0 / given.quantizer.step_size) + given.quantizer.zero_point
        found["activations"] = histogram(units, spec.act_bits)
    if folded is None or jnp.iscomplexobj(folded.weight):
        return found
    if spec.weight_bits is not None:
        scale, zero = per_channel(op, state.scale), per_channel(op, state.zero_point)
        found["weights"] = histogram(folded.weight / scale + zero, spec.weight_bits)
    exact = run_layer(
        op, spec, LayerInput(given.x), Weights(jnp.asarray(folded.weight), state.bias, {})
    )
    difference, exact = (jnp.abs(a).astype(jnp.float32) for a in (y - exact.astype(y.dtype), exact))
    found["error"] = jnp.sum(difference**2) / jnp.maximum(jnp.sum(exact**2), jnp.float32(1e-30))
    return found


def histogram(codes: Float[AnyArray, "..."], bits: int) -> Float32[Array, "bins"]:
    """Counts of real-valued codes in the bins of `bounds`; the end bins hold what lies beyond."""
    low, high = bounds(bits)
    position = (codes.astype(jnp.float32) - low) * (BINS / (high - low))
    index = jnp.clip(jnp.floor(position), 0, BINS - 1).astype(jnp.int32)
    return jnp.bincount(index.ravel(), length=BINS).astype(jnp.float32)


def bounds(bits: int) -> tuple[float, float]:
    """The range of a histogram, in codes: half a code and a quarter of the grid beyond its ends.

    >>> bounds(2)
    (-1.25, 4.25)
    """
    margin = 0.5 + MARGIN * (2**bits - 1)
    return -margin, 2**bits - 1 + margin


def _plain(found: Mapping[str, Any], weight_bits: int | None, act_bits: int) -> Record:
    record: Record = {}
    for name, bits in (("weights", weight_bits), ("activations", act_bits)):
        if name in found and bits is not None:
            low, high = bounds(bits)
            counts = np.asarray(found[name]).astype(int).tolist()
            record[name] = {"low": low, "high": high, "counts": counts}
    if "error" in found:
        record["error"] = float(found["error"])
    return record
