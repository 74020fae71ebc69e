"""The result of quantization: a callable pytree that holds what is deployed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import TensorState
from aquant_jax.errors import InputError
from aquant_jax.graph.fold import fold
from aquant_jax.graph.trace import trace
from aquant_jax.layers.fake_quant import LayerSpec, LayerState
from aquant_jax.layers.integer import run_deployed_layer, run_integer_layer
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.block_program import Unit, forward, make_unit
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.report import History, LayerSummary


class Backend(Protocol):
    """Integer operations for deployment, such as ``gpu_ops.backend()``; hashable."""

    convolve_codes: Callable[..., jax.Array]
    """See `integer.run_integer_layer`."""


class Program(Protocol):
    """What runs a quantized network; hashable, for jit."""

    def __call__(self, quantized: Quantized, x) -> Any:
        """Outputs for a batch of inputs."""


class Traced(NamedTuple):
    """Runs a network along the trace of its float inference function.

    Attributes:
      apply: only its trace is used, never its weights.
      treedef: of the variables.
      shapes: and dtypes of their leaves.
      input_tree, input_shapes: likewise, of the calibration set.
    """

    apply: Callable
    treedef: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    input_tree: Any
    input_shapes: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def inputs(self) -> Any:
        """Shapes and dtypes of the calibration set."""
        return jax.tree.unflatten(self.input_tree, self.input_shapes)

    def __call__(self, quantized: Quantized, x):
        layer = run_deployed_layer
        if quantized.backend is not None:
            convolve = quantized.backend.convolve_codes
            layer = functools.partial(run_integer_layer, convolve=convolve)
        return self.run(quantized, x, layer)

    def run(self, quantized: Quantized, x, layer: Callable[..., jax.Array]):
        """Outputs, each layer run by `layer`, which has the arguments of `run_deployed_layer`."""
        graph = fold(trace(self.apply, jax.tree.unflatten(self.treedef, self.shapes), x))
        unit = make_unit(graph, make_plan(graph, quantized.recipe), (), graph.outputs)
        _check_same(quantized, unit)
        by_id = dict(zip(graph.inputs, jax.tree.leaves(x), strict=True)) | graph.constants
        by_id |= {i: quantized.static.get(path) for i, path in graph.variables.items()}
        outputs = forward(
            unit,
            [quantized.layers[spec.path] for spec in unit.specs],
            [quantized.tensors[tensor.key] for tensor in unit.tensors],
            (),
            [by_id[i] for i in unit.program.side],
            [by_id[i] for i in unit.program.static],
            layer=layer,
        )
        return jax.tree.unflatten(graph.tree, outputs)


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit(quantized) hashes it by identity
class Quantized:
    """A quantized network: ``quantized(x)`` runs it; it is a pytree and can be jitted.

    Attributes:
      layers: deployed state of every layer, by weight path.
      tensors: grid of every quantized activation tensor, by the path of its first reader.
      static: the other leaves of the variables that the folded network still reads, by path.
      program: what runs it on a batch.
      specs: static part of every layer.
      recipe: how it was made.
      reports: how the reconstruction of each block went.
      backend: what runs it; None runs the definition, in float32. See `with_backend`.
    """

    layers: dict[str, LayerState]
    tensors: dict[str, TensorState]
    static: dict[str, jax.Array]
    program: Program = dataclasses.field(metadata={"static": True})
    specs: tuple[LayerSpec, ...] = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})
    reports: History = dataclasses.field(metadata={"static": True}, default=History())
    backend: Backend | None = dataclasses.field(metadata={"static": True}, default=None)

    def __call__(self, x):
        """Run the network on a batch of any size; same pytree of outputs as the float one."""
        return _run(self, x)

    def with_backend(self, backend: Backend | None) -> Quantized:
        """The same network, run by `backend`: the same codes, outputs within float rounding.

        For inference: it need not be differentiable. In float32 the definition sums whole numbers
        too, exactly below 2^24; in half precision it rounds, and an activation within that of a
        border may get another code. Where the definition hands not-a-number on, a code is a number.

        Args:
          backend: such as ``gpu_ops.backend()``, which multiplies int8 codes; None goes back to
            the definition.
        """
        return dataclasses.replace(self, backend=backend)

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


def traced(apply: Callable, variables, inputs) -> Traced:
    """The program of an inference function for variables and inputs of these shapes."""
    return Traced(apply, *_shapes(variables), *_shapes(inputs))


def _shapes(tree):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in leaves)


def _check_same(quantized: Quantized, unit: Unit) -> None:
    """A network may compute something else for another shape of its input."""
    found = {spec.path for spec in unit.specs} | {tensor.key for tensor in unit.tensors}
    differ = found ^ (quantized.layers.keys() | quantized.tensors.keys())
    if differ:
        raise InputError(
            f"for inputs of this shape the network has other layers or activations to quantize "
            f"than for those it was calibrated on: {', '.join(sorted(differ)[:5])}"
        )


jax.tree_util.register_dataclass(Quantized)


@jax.jit
def _run(quantized: Quantized, x):
    return quantized.program(quantized, x)
