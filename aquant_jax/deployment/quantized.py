"""The result of quantization: a callable pytree that holds what is deployed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import ActivationQuantizer
from aquant_jax.deployment import stacked
from aquant_jax.deployment.explicit_axes import with_auto_axes
from aquant_jax.deployment.integer_program import run_integers
from aquant_jax.deployment.layer_summary import LayerSummary, Summary
from aquant_jax.deployment.states import on_host, store_stacked
from aquant_jax.errors import InputError, check_type
from aquant_jax.graph.fold import fold
from aquant_jax.graph.ir import Graph, Unquantized
from aquant_jax.graph.subgraph import BlockInputs
from aquant_jax.graph.targets import focus
from aquant_jax.graph.trace import trace
from aquant_jax.layers.backend import Backend
from aquant_jax.layers.fake_quant import LayerSpec, LayerState
from aquant_jax.layers.integer import run_deployed_layer
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.block_program import BlockProgram, forward
from aquant_jax.plan.network import batch_shapes, batch_size, count_samples, in_batches
from aquant_jax.recipe import Recipe
from aquant_jax.reconstruction.report import History


class _OtherLayersError(InputError):
    """A network computes something else for a batch than for those it was calibrated on."""


class Program(Protocol):
    """Runs a quantized network; hashable, for jit."""

    def __call__(self, quantized: Quantized, x: Any) -> Any:
        """Outputs for a batch of inputs."""


class Traced(NamedTuple):
    """Runs a network along the trace of its float inference function.

    Attributes:
      apply: only its trace is used, never its weights.
      treedef: of the variables.
      shapes: and dtypes of their leaves.
      input_tree, input_shapes: likewise, of the calibration set.
      targets: see `graph.targets.focus`.
    """

    apply: Callable
    treedef: Any
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    input_tree: Any
    input_shapes: tuple[jax.ShapeDtypeStruct, ...]
    targets: tuple[int, ...] | None = None

    @property
    def inputs(self) -> Any:
        """Shapes and dtypes of the calibration set."""
        return jax.tree.unflatten(self.input_tree, self.input_shapes)

    def __call__(self, quantized: Quantized, x: Any) -> Any:
        return self.run(quantized, x)

    def graph(self, quantized: Quantized, variables: Any, x: Any) -> Graph:
        """The graph for a batch, not folded: its weighted ops are those that are quantized."""
        return focus(trace(self.apply, variables, x), self.targets, quantized.unquantized)

    def run(
        self, quantized: Quantized, x: Any, layer: Callable[..., jax.Array] = run_deployed_layer
    ) -> Any:
        """Outputs, by the network's backend.

        Where a loop has other layers for this number of samples, as the rest of a `jax.lax.map`
        with a `batch_size` has, the network runs in batches of the number it was calibrated with.

        Args:
          quantized: the network.
          x: a batch of inputs.
          layer: runs one layer where the network has no backend; has the arguments of
            `run_deployed_layer`.
        """
        run = functools.partial(self._run, quantized, layer)
        samples, size = count_samples(x), batch_size(quantized.recipe, count_samples(self.inputs))
        try:
            return run(x)
        except _OtherLayersError:
            known = isinstance(samples, int) and samples not in (0, size)
            if not known or not self._has_loop(quantized, size):
                raise
            outputs = jax.tree.leaves(jax.eval_shape(run, batch_shapes(x, size)))
            sampled = self.targets is None or len(self.targets) == len(outputs)
            if not sampled or any(out.shape[:1] != (size,) for out in outputs):
                raise
            return in_batches(run, x, size)

    def _has_loop(self, quantized: Quantized, size: int) -> bool:
        variables = jax.tree.unflatten(self.treedef, self.shapes)
        graph = self.graph(quantized, variables, batch_shapes(self.inputs, size))
        return any(op.loop or op.iteration for op in graph.ops)

    def _run(self, quantized: Quantized, layer: Callable[..., jax.Array], x: Any) -> Any:
        variables = jax.tree.unflatten(self.treedef, self.shapes)
        with _dtypes_named(x, self.inputs):
            graph = fold(self.graph(quantized, variables, x))
            plan = make_plan(graph, quantized.recipe)
            parts = stacked.split(graph, plan, rolled=layer is run_deployed_layer)
            _check_same(quantized, [program for part in parts for program in part.programs])
        values = dict(zip(graph.inputs, jax.tree.leaves(x), strict=True)) | graph.constants
        values |= {i: quantized.constants.get(path) for i, path in graph.variables.items()}

        def run_program(
            program: BlockProgram, state: stacked.State, inputs: BlockInputs
        ) -> tuple[Any, ...]:
            if quantized.backend is not None and all(map(np.size, jax.tree.leaves(x))):
                return run_integers(
                    program, state.layers, state.activations, inputs, quantized.backend
                )
            return forward(program, state.layers, state.activations, inputs, layer=layer)

        outputs = stacked.run(parts, graph, values, quantized.states, run_program)
        return jax.tree.unflatten(graph.tree, outputs)


@dataclasses.dataclass(frozen=True, eq=False)  # jax.jit(quantized) hashes it by identity
class Quantized:
    """A quantized network: ``quantized(x)`` runs it; it is a pytree and can be jitted.

    >>> import numpy as np
    >>> import jax
    >>> import aquant_jax as aq
    >>> apply = lambda variables, x: x @ variables["kernel"]
    >>> samples = np.eye(4, dtype=np.float32)
    >>> network = aq.quantize(apply, {"kernel": samples}, samples, aq.recipes.nearest(8, 8))
    >>> jax.jit(network)(samples).shape
    (4, 4)
    >>> [(layer.path, layer.weight_bits) for layer in network.summary()]
    [('kernel', 8)]

    Attributes:
      layers: deployed state of every layer, by weight path.
      activations: quantizer of every quantized activation tensor, by the path of its first reader.
      constants: the other leaves of the variables that the folded network reads, by path.
      program: runs the network on a batch.
      specs: static part of every layer.
      recipe: how it was made.
      unquantized: the weighted ops that stay float, because no layer can stand for them.
      reports: how the reconstruction of each block went, and the whole-network stage, if it ran.
      backend: runs its layers in integers; None runs the reference implementation, in float32.
    """

    layers: Mapping[str, LayerState]
    activations: Mapping[str, ActivationQuantizer]
    constants: Mapping[str, jax.Array]
    program: Program = dataclasses.field(metadata={"static": True})
    specs: tuple[LayerSpec, ...] = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})
    reports: History = dataclasses.field(metadata={"static": True}, default=History())
    backend: Backend | None = dataclasses.field(metadata={"static": True}, default=None)
    unquantized: tuple[Unquantized, ...] = dataclasses.field(metadata={"static": True}, default=())

    def __call__(self, x: Any) -> Any:
        """Run the network on a batch of any size; the same pytree of outputs as the float one."""
        return with_auto_axes(_run, self, x)

    def with_backend(self, backend: Backend | None) -> Quantized:
        """The same network, run by `backend`: the same codes, outputs within float rounding.

        For inference; it need not be differentiable. In float32 the reference implementation sums
        whole numbers too, exactly below 2^24. In half precision it rounds, and an activation within
        that rounding of a border may get another code. NaN passes through the reference
        implementation; a backend gives it a code.

        Args:
          backend: such as ``gpu_ops.backend()``, which multiplies int8 codes; None selects the
            reference implementation.
        """
        if backend is not None:
            check_type("backend", backend, Backend, "an aq.Backend, such as gpu_ops.backend()")
        return dataclasses.replace(self, backend=backend)

    @property
    def states(self) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]:
        """What is deployed, by path: layers, activations and constants."""
        return self.layers, self.activations, self.constants

    def with_states(self, states: Iterable[Mapping[str, Any]]) -> Quantized:
        """The same network with other states."""
        layers, activations, constants = states
        return dataclasses.replace(
            self, layers=layers, activations=activations, constants=constants
        )

    def with_stacks(self, stacks: Iterable[Iterable[Sequence[str]]]) -> Quantized:
        """The same network, stored as its program reads it.

        Args:
          stacks: of the layers, activations and constants: the paths of those stored as one.
        """
        return self.with_states(map(store_stacked, self.states, stacks))

    def on_host(self) -> Quantized:
        """The same network in numpy arrays, each state by its path."""
        return self.with_states(map(on_host, self.states))

    def summary(self) -> Summary:
        """Path, shape, bits, step size, zero point, borders and codes of every layer.

        A list of `LayerSummary`, which prints a line a layer; ``rich.print`` shows a table.
        """
        return Summary(map(self._summarize, self.specs))

    def _summarize(self, spec: LayerSpec) -> LayerSummary:
        state = jax.tree.map(np.asarray, self.layers[spec.path])
        tensor = self.activations[spec.tensor] if spec.tensor else None
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
            border_function=spec.border,
            phi=borders.get_phi(spec.phi).deployed,
            border_granularity=spec.border_granularity,
            codes=state.codes,
        )


def traced(
    apply: Callable, variables: Any, inputs: Any, targets: tuple[int, ...] | None = None
) -> Traced:
    """The program of an inference function for variables and inputs of these shapes."""
    return Traced(apply, *_shapes(variables), *_shapes(inputs), targets)


def _shapes(tree: Any) -> tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple(jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in leaves)


@contextlib.contextmanager
def _dtypes_named(x: Any, calibrated: Any) -> Iterator[None]:
    """Adds the dtypes of the input, if they are not the calibrated ones, to an InputError."""
    try:
        yield
    except InputError as error:
        given, wanted = (
            ", ".join(str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree))
            for tree in (x, calibrated)
        )
        if given == wanted:
            raise
        raise type(error)(
            f"{error}; the input is of {given}, and the network was calibrated on {wanted}"
        ) from error


def _check_same(quantized: Quantized, programs: Sequence[BlockProgram]) -> None:
    """A network may compute something else for another shape of its input."""
    names = {part.path for program in programs for part in program.specs}
    names |= {tensor.key for program in programs for tensor in program.tensors}
    differ = names ^ (quantized.layers.keys() | quantized.activations.keys())
    if differ:
        raise _OtherLayersError(
            f"for inputs of this shape the network has other layers or activations to quantize "
            f"than for those it was calibrated on: {', '.join(sorted(differ)[:5])}"
        )


jax.tree_util.register_dataclass(Quantized)


def check_quantized(network: Any) -> None:
    """InputError unless `network` is a quantized network."""
    check_type("network", network, Quantized, "what aq.quantize or aq.restore returns")


@jax.jit
def _run(quantized: Quantized, x: Any) -> Any:
    return quantized.program(quantized, x)
