"""The traced network: a flat list of equations in which weighted ops are named by weight path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

# These hand a tensor on without making a new one (design.md, "the operation").
SHAPE_ONLY = {"reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "copy", "copy_p"}
# What ``x[:, 0]`` is in a trace with a symbolic number of samples, where it is no slice.
STATIC_GATHER = "gather at constant places"
PAD_WITH_VALUE = "pad with a value"  # which makes a new tensor
ALIASES = SHAPE_ONLY | {
    "pad", "convert_element_type", "reduce_window_max", "stop_gradient", STATIC_GATHER,
}  # fmt: skip


class Layer(NamedTuple):
    """What is static about one weighted op.

    Attributes:
      path: path of its weight in the variables, with ``#2``, ``#3`` ... when the weight is reused.
      kind: "conv" or "dense".
      weight: value id of the weight operand.
      weight_shape: shape of that operand, as the op sees it.
      channel_axes: axes of the operand that number output channels.
      output_axes: the axes of the output that these become.
      x_position: which operand of the op is the activation (0 or 1).
    """

    path: str
    kind: str
    weight: int
    weight_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    x_position: int


class Op(NamedTuple):
    """One equation of the flat program.

    Attributes:
      name: its primitive.
      params: the primitive's parameters; of a weighted op also ``operand_dtypes``.
      call: the equation as a function of its operands, with its own gradient rules.
      inputs: value ids, or literals.
      outputs: value ids. A weighted op that `fold` rewrote has those of the chain it absorbed.
      layer: a `Layer` on weighted ops, else None.
      primitives: the names of what it is made of: its own, or those inside a function that has a
        gradient of its own, such as `jax.nn.relu`.
    """

    name: str
    params: dict[str, Any]
    call: Callable[..., list[Any]]
    inputs: tuple[Any, ...]
    outputs: tuple[int, ...]
    layer: Any = None
    primitives: frozenset[str] = frozenset()

    @property
    def reads(self) -> tuple[int, ...]:
        """Value ids that the op needs to run; the weight of a weighted op comes from state."""
        if self.layer is not None:
            return (self.inputs[self.layer.x_position],)
        return tuple(i for i in self.inputs if isinstance(i, int))

    @property
    def x(self) -> int:
        """Value id of the activation of a weighted op."""
        assert self.layer is not None
        return self.inputs[self.layer.x_position]


class Graph(NamedTuple):
    """A flat network.

    Attributes:
      ops: in topological order, static ones (those that do not depend on the input) included.
      inputs: value ids of the input's leaves.
      variables: path of every leaf of the variables, by value id.
      constants: arrays that the function closed over, by value id.
      outputs: value ids (or literals) of the output's leaves.
      avals: shape and dtype of every value.
      dynamic: ids that depend on the input.
      live: ids that depend on the input and on a weight.
      tree: tree definition of the output.
      tokens: the axes that number the positions of a padded sequence, by value id; see `quantize`.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    variables: dict[int, str]
    constants: dict[int, Any]
    outputs: tuple[Any, ...]
    avals: dict[int, Any]
    dynamic: frozenset[int]
    live: frozenset[int]
    tree: Any
    tokens: Mapping[int, tuple[int, ...]] = MappingProxyType({})

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(op.layer for op in self.ops if op.layer is not None)

    def consumers(self) -> dict[int, list[int]]:
        """Indices of the ops that read each value."""
        table: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for value in dict.fromkeys(op.reads):
                table.setdefault(value, []).append(index)
        return table

    def producers(self) -> dict[int, Op]:
        return {out: op for op in self.ops for out in op.outputs}


def path_names(tree) -> list[str]:
    """``a/b/kernel`` for every leaf of `tree`, in order; without the box of an NNX variable."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    short = [name.removesuffix("/value") for name in names]
    return short if len(set(short)) == len(set(names)) else names


def sample_first(graph: Graph, other: Graph, samples: int) -> frozenset[int]:
    """The values whose first axis, and no other, numbers the samples.

    Args:
      graph: of `samples` samples.
      other: the same function traced with one more.
    """
    found = set()
    for value, aval in graph.avals.items():
        shape, more = aval.shape, getattr(other.avals.get(value), "shape", ())
        if shape[:1] == (samples,) and more == (samples + 1, *shape[1:]):
            found.add(value)
    return frozenset(found)


def token_axes(graph: Graph, other: Graph, sampled: frozenset[int]) -> dict[int, tuple[int, ...]]:
    """The axes that number the positions of a sequence, of the values that have any.

    Args:
      graph: of sequences of some length.
      other: the same function traced with sequences that are shorter by one.
      sampled: the values whose first axis numbers the samples; no others are looked at.
    """
    found = {}
    for value in sampled:
        shape, less = graph.avals[value].shape, getattr(other.avals.get(value), "shape", ())
        axes = tuple(i for i, (n, m) in enumerate(zip(shape, less, strict=False)) if n == m + 1)
        if axes and len(shape) == len(less) and axes[0] > 0:
            found[value] = axes
    return found
