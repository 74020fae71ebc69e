"""Runnable slices of a graph: `extract_subgraph` collects their ops, `run` evaluates them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from aquant_jax.graph.ir import ALIASES, SHAPE_ONLY, TO_COMPLEX, Atom, Graph, Op
from aquant_jax.graph.loops import regions, run_ops

LayerFn = Callable[[Op, Any], Any]
ReadFn = Callable[[int, Any], Any]


class Subgraph(NamedTuple):
    """A runnable slice of a graph.

    Attributes:
      ops: the equations, in topological order.
      boundary_inputs: ids of the values that it takes from the previous slice.
      model_inputs: ids of the leaves of the model's input that it reads.
      constants: ids of the leaves of the variables, and of the closed-over arrays, that it reads.
      outputs: value ids or literals. A value of the steps of a loop is stacked along its last axis.
    """

    ops: tuple[Op, ...]
    boundary_inputs: tuple[int, ...]
    model_inputs: tuple[int, ...]
    constants: tuple[int, ...]
    outputs: tuple[Atom, ...]

    @property
    def weighted(self) -> tuple[Op, ...]:
        """The ops that have a weight."""
        return tuple(op for op in self.ops if op.layer is not None)


class BlockInputs(NamedTuple):
    """The values that a subgraph reads (a pytree).

    Attributes:
      boundary: of its boundary inputs, in their order.
      model: of its model inputs.
      constants: of its constants.
    """

    boundary: Sequence[Any] = ()
    model: Sequence[Any] = ()
    constants: Sequence[Any] = ()


def extract_subgraph(
    graph: Graph, boundary_inputs: Sequence[int], outputs: Sequence[Atom]
) -> Subgraph:
    """The slice that computes some values.

    Args:
      graph: the network.
      boundary_inputs: values that are given; their ops are left out.
      outputs: the values to compute, as ids or literals.
    """
    groups = regions(graph.ops)
    group_of = {out: group for group in groups for op in group for out in op.outputs}
    needed: set[int] = set()
    stack = [out for out in outputs if isinstance(out, int)]
    while stack:
        value = stack.pop()
        if value in needed:
            continue
        needed.add(value)
        if value not in boundary_inputs and value in group_of:
            stack.extend(i for op in group_of[value] for i in (*op.reads, *op.outputs))
    ops = tuple(
        op for op in graph.ops
        if any(out in needed and out not in boundary_inputs for out in op.outputs)
    )  # fmt: skip
    return Subgraph(
        ops,
        tuple(boundary_inputs),
        tuple(i for i in graph.inputs if i in needed and i not in boundary_inputs),
        tuple(i for i in (*graph.variables, *graph.slices, *graph.constants) if i in needed),
        tuple(outputs),
    )


def run(
    subgraph: Subgraph,
    inputs: BlockInputs,
    layer_fn: LayerFn,
    read_fn: ReadFn = lambda value_id, value: value,
) -> tuple[Any, ...]:
    """Evaluate `subgraph`.

    Args:
      subgraph: the slice to evaluate.
      inputs: the values that it reads.
      layer_fn: ``layer_fn(op, x)`` computes a weighted op from its unquantized activation.
      read_fn: ``read_fn(value_id, value)`` is the value that any other op reads. Ops of `ALIASES`
        pass values on without it.

    Returns:
      The values of ``subgraph.outputs``.
    """
    env = _Values({}, read_fn)
    env.values.update(zip(subgraph.boundary_inputs, inputs.boundary, strict=True))
    env.values.update(zip(subgraph.model_inputs, inputs.model, strict=True))
    env.values.update(zip(subgraph.constants, inputs.constants, strict=True))

    def run_op(op: Op, env: _Values) -> None:
        if op.layer is not None:
            results = [layer_fn(op.bind(env.through), env.values[op.x])]
        else:
            read = env.through if op.name in ALIASES else env.read
            results = op.call(*map(read, op.inputs))
        env.values.update(zip(op.outputs, results, strict=True))

    run_ops(subgraph.ops, env, run_op, subgraph.outputs)
    # Outputs are not passed through `read_fn`: they are quantized where they are consumed.
    return tuple(map(env.through, subgraph.outputs))


class _Values(NamedTuple):
    """The values of a run, and what an op reads of each."""

    values: dict[int, Any]
    read_fn: ReadFn

    def through(self, atom: Atom) -> Any:
        return self.values[atom] if isinstance(atom, int) else atom.val

    def read(self, atom: Atom) -> Any:
        value = self.through(atom)
        return self.read_fn(atom, value) if isinstance(atom, int) else value

    def copy(self) -> _Values:
        return self._replace(values=dict(self.values))


def source_tensor(producers: dict[int, Op], value: int) -> int:
    """The tensor that `value` is a reshaped, padded, cast or max-pooled view of.

    A complex value is a view of no real tensor.
    """
    while value in producers:
        op = producers[value]
        passes_on = op.name in ALIASES and op.name != TO_COMPLEX
        if op.layer is not None or not passes_on or not op.reads:
            break
        value = op.reads[0]
    return value


def same_elements(producers: dict[int, Op], value: int) -> Op | None:
    """The op that made `value` by rearranging the elements of another value, or None."""
    op = producers.get(value)
    return op if op is not None and op.layer is None and op.name in SHAPE_ONLY else None


def constant_values(graph: Graph, variables: Any, ids: Sequence[int]) -> dict[int, Any]:
    """The values that `ids` number, none of which depends on the input."""
    subgraph = extract_subgraph(graph, (), tuple(ids))
    inputs = BlockInputs(constants=constant_inputs(graph, subgraph, variables))
    values = run(subgraph, inputs, _no_layer)
    return dict(zip(ids, values, strict=True))


def constant_inputs(graph: Graph, subgraph: Subgraph, variables: Any) -> list[Any]:
    """The values of ``subgraph.constants``, given the variables of the network."""
    by_id = dict(zip(graph.variables, jax.tree.leaves(variables), strict=True)) | graph.constants
    parts = {i: graph.slices[i] for i in subgraph.constants if i in graph.slices}
    derived = {part.stack for part in parts.values()} - by_id.keys()
    if derived:
        by_id |= constant_values(graph, variables, sorted(derived))
    by_id |= {i: by_id[part.stack][part.index] for i, part in parts.items()}
    return [by_id[i] for i in subgraph.constants]


def bind_inputs(
    graph: Graph,
    subgraph: Subgraph,
    variables: Any,
    leaves: Mapping[int, Any],
    boundary: Sequence[Any] = (),
) -> BlockInputs:
    """The inputs of a subgraph.

    Args:
      graph: of which it is a slice.
      subgraph: the slice.
      variables: of the network.
      leaves: of the model's input, by value id.
      boundary: values of ``subgraph.boundary_inputs``.
    """
    model = tuple(leaves[i] for i in subgraph.model_inputs)
    return BlockInputs(boundary, model, tuple(constant_inputs(graph, subgraph, variables)))


def _no_layer(op: Op, x: Any) -> Any:
    raise AssertionError(f"{op.layer.path} depends on the input")


def signature(graph: Graph, subgraph: Subgraph) -> str:
    """A text that is equal for subgraphs that compute the same function of their inputs."""
    local: dict[int, int] = {}
    numbers: dict[int, int] = {}  # of loops

    def name(atom: Atom) -> str:
        if not isinstance(atom, int):
            return f"={atom.val!r}"
        aval = graph.avals[atom]
        return f"v{local.setdefault(atom, len(local))}:{aval.dtype}{aval.shape}"

    lines = [" ".join(map(name, group)) for group in subgraph[1:4]]
    for op in subgraph.ops:
        # Addresses of function objects are dropped; the jaxprs printed beside them are unique.
        params = re.sub(r" at 0x[0-9a-f]+|id=\d+", "", str(sorted(op.params.items(), key=str)))
        values = [name(i) for i in op.inputs if not (op.layer and i == op.layer.weight)]
        weight = op.layer and (op.layer.kind, op.layer.weight_shape, op.layer.x_position)
        lines.append(f"{' '.join(map(name, op.outputs))} = {op.name} {values} {weight} {params}")
        if op.loop is not None:
            lines[-1] += f" {numbers.setdefault(op.loop.number, len(numbers))} {op.loop[1:3]}"
    return "\n".join([*lines, " ".join(map(name, subgraph.outputs))])
