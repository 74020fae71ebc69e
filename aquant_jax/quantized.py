"""The result of quantization: a callable pytree that holds what is deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aquant_jax import border as borders
from aquant_jax.fold import fold
from aquant_jax.graph import trace
from aquant_jax.layer import LayerSpec, LayerState
from aquant_jax.numerics import TensorState
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruct import deployed_weights
from aquant_jax.unit import forward, make_unit


class LayerSummary(NamedTuple):
    """One quantized layer, in numpy.

    Attributes:
      path: path of its weight; kind: "conv" or "dense"; shape: of the weight.
      weight_bits, act_bits: None where float.
      step_size, zero_point: of its input tensor, or None.
      weight_scale, weight_zero_point: per output channel, or None.
      border: coefficients ``(taps, channels)`` by name, or None for nearest rounding.
      phi: map from the polynomial to the border; fused: averaged over a channel's taps.
      codes: uint8 weight codes (float weights of a float layer).
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    act_bits: int | None
    step_size: float | None
    zero_point: int | None
    weight_scale: np.ndarray | None
    weight_zero_point: np.ndarray | None
    border: dict[str, np.ndarray] | None
    phi: str
    fused: bool
    codes: np.ndarray


class BlockReport(NamedTuple):
    """How the reconstruction of one unit went.

    Attributes:
      index, name, layers: which unit.
      steps: optimisation steps taken.
      loss_curve: ``[k, 2]``: step, reconstruction loss (mean since the row before).
      start_error, final_error: loss of the unit on the calibration set, weights rounded, from the
        quantized prefix's activations: rounded to nearest, and as deployed.
      kept_start: reconstruction made it worse, so the nearest start was kept.
      seconds: wall clock.
      propagated: ``[16, 4]``: clusters of the unit's input by magnitude: mean ``|x'|``, mean and
        standard deviation of the propagated error ``x' - x``, count (Fig. 2); empty for the first.
    """

    index: int
    name: str
    layers: tuple[str, ...]
    steps: int
    loss_curve: np.ndarray
    start_error: float
    final_error: float
    kept_start: bool
    seconds: float
    propagated: np.ndarray


class History(tuple):
    """Reports of the blocks; equal to any other, since how a network was made is not part of what
    it computes (and must not make jit compile it again)."""

    def __eq__(self, other):
        return isinstance(other, History)

    def __hash__(self):
        return hash(History)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized network: ``quantized(x)`` runs it; it is a pytree and can be jitted.

    Attributes:
      layers: deployed state of every layer, by weight path.
      tensors: grid of every quantized activation tensor, by the path of its first reader.
      static: the other leaves of the variables that the folded network still reads, by path.
      apply: the float inference function; only its trace is used, never its weights.
      shapes: tree definition, and shapes and dtypes, of the variables.
      specs: static part of every layer.
      recipe: how it was made.
      reports: how the reconstruction of each block went.
    """

    layers: dict[str, LayerState]
    tensors: dict[str, TensorState]
    static: dict[str, jax.Array]
    apply: Callable = dataclasses.field(metadata={"static": True})
    shapes: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]] = dataclasses.field(
        metadata={"static": True}
    )
    specs: tuple[LayerSpec, ...] = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})
    reports: History = dataclasses.field(metadata={"static": True}, default=History())

    def __call__(self, x):
        """Run the network on a batch of any size; same pytree of outputs as the float one."""
        return _run(self, x)

    def summary(self) -> list[LayerSummary]:
        """Path, shape, bits, step size, zero point, borders and codes of every layer."""
        return [self._summarize(spec) for spec in self.specs]

    def _summarize(self, spec: LayerSpec) -> LayerSummary:
        state = jax.tree.map(np.asarray, self.layers[spec.path])
        tensor = self.tensors[spec.tensor] if spec.tensor else None
        exact = spec.weight_bits is None
        return LayerSummary(
            path=spec.path,
            kind=spec.kind,
            shape=state.codes.shape,
            weight_bits=spec.weight_bits,
            act_bits=spec.act_bits if tensor else None,
            step_size=float(tensor.step_size) if tensor else None,
            zero_point=int(tensor.zero_point) if tensor else None,
            weight_scale=None if exact else state.scale,
            weight_zero_point=None if exact else state.zero_point,
            border=dict(state.border) or None,
            phi=borders.get_phi(spec.phi).deployed,
            fused=spec.fused,
            codes=state.codes,
        )


jax.tree_util.register_dataclass(Quantized)


@jax.jit
def _run(quantized: Quantized, x):
    treedef, shapes = quantized.shapes
    graph = fold(trace(quantized.apply, jax.tree.unflatten(treedef, shapes), x))
    specs = {spec.path: spec for spec in quantized.specs}
    unit = make_unit(graph, specs, (), graph.outputs)
    layers = [quantized.layers[spec.path] for spec in unit.specs]
    tensors = [quantized.tensors[tensor.key] for tensor in unit.tensors]
    by_id = dict(zip(graph.inputs, jax.tree.leaves(x), strict=True)) | graph.constants
    by_id |= {i: quantized.static.get(path) for i, path in graph.variables.items()}
    outputs = forward(
        unit,
        deployed_weights(unit, layers),
        tensors,
        (),
        [by_id[i] for i in unit.program.side],
        [by_id[i] for i in unit.program.static],
    )
    return jax.tree.unflatten(graph.tree, outputs)
