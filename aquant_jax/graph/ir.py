"""The traced network: a flat list of equations, whose weighted ops carry the path of the weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

# Ops that pass a tensor on without making a new one (docs/explanation/graph.md).
SHAPE_ONLY = {"reshape", "transpose", "squeeze", "expand_dims", "slice", "rev", "copy", "copy_p"}
# ``x[:, 0]`` is a gather, not a slice, in a trace with a symbolic number of samples.
STATIC_GATHER = "gather at constant places"
PAD_WITH_VALUE = "pad with a value"  # makes a new tensor, unlike a pad with zero or -infinity
TO_COMPLEX = "convert to complex"  # passes its tensor on exactly: nothing complex is quantized
# Jitted functions of `plan.channel_transform`, which a trace keeps as one op each.
TRANSFORM, INVERSE = "aquant_channel_transform", "aquant_inverse_transform"
# The ends of a loop whose steps are a region of the graph (`graph.loops`).
LOOP_SLICE, LOOP_CARRY = "loop slice", "loop carry"  # what a step reads
LOOP_RESULT, LOOP_STACK = "loop result", "loop stack"  # what it makes of the values of a step
ALIASES = SHAPE_ONLY | {
    "pad", "convert_element_type", "reduce_window_max", "stop_gradient", STATIC_GATHER, TO_COMPLEX,
    LOOP_SLICE,
}  # fmt: skip
RAGGED = "ragged_dot_general"
PRODUCTS = {"dot_general", "conv_general_dilated", RAGGED}


@runtime_checkable
class Literal(Protocol):
    """A constant operand of an equation.

    Attributes:
      val: its value.
    """

    val: Any


Atom = int | Literal  # an operand: a value id or a literal


class Layer(NamedTuple):
    """The weight of one weighted op, and its place among the operands.

    Attributes:
      path: path of its weight in the variables, with ``#2``, ``#3`` ... when the weight is reused.
      kind: "conv", "dense" or "experts": a stack of dense weights, of which the input selects.
      weight: value id of the weight operand.
      weight_shape: shape of that operand, as the op sees it.
      channel_axes: axes of the operand that number output channels, and experts.
      output_axes: the corresponding axes of the output; of "experts" those that there are.
      column_axes: axes of the activation that number column elements; empty for a conv.
      x_position: index of the activation among the operands (0 or 1).
    """

    path: str
    kind: str
    weight: int
    weight_shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    x_position: int


class Loop(NamedTuple):
    """A loop that stays rolled: its ends and the ops of one step are consecutive ops of the graph.

    Attributes:
      number: counts the loops of a graph.
      length: number of its steps.
      reverse: whether the last step comes first.
      outer: the loop that it is a part of, or None.
    """

    number: int
    length: Any
    reverse: bool
    outer: Any = None

    @property
    def outermost(self) -> Loop:
        """The loop around it that is part of no other."""
        return self if self.outer is None else self.outer.outermost


class Unquantized(NamedTuple):
    """A weighted op that stays an ordinary float op, because no layer can stand for it.

    Attributes:
      path: path of its weight, as in a `Layer`.
      primitive: its primitive.
      reason: why it is not quantized.
    """

    path: str
    primitive: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.primitive}): {self.reason}"


class Op(NamedTuple):
    """One equation of the flat program.

    Attributes:
      name: its primitive.
      params: the primitive's parameters; those of a weighted op include ``operand_dtypes``.
      call: the equation as a function of its operands, with its own gradient rules.
      inputs: value ids or literals.
      outputs: value ids. A weighted op that `fold` rewrote has those of the chain it absorbed.
      layer: a `Layer` on weighted ops, otherwise None.
      primitives: its primitive, or the primitives inside a function with a custom gradient, such as
        `jax.nn.relu`.
      loop: the innermost rolled loop that the op is part of, or None.
      iteration: the iterations of unrolled loops that the op is part of, ``number[step]`` of each,
        such as ``1[3]``; empty outside.
    """

    name: str
    params: dict[str, Any]
    call: Callable[..., list[Any]]
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    layer: Any = None
    primitives: frozenset[str] = frozenset()
    loop: Loop | None = None
    iteration: str = ""

    @property
    def reads(self) -> tuple[int, ...]:
        """Value ids that the op needs to run; the weight of a weighted op comes from state."""
        weight = self.layer and self.layer.weight
        return tuple(i for i in self.inputs if isinstance(i, int) and i != weight)

    @property
    def steps(self) -> Any:
        """How often the op runs in the rolled loops that it is part of."""
        loop, count = self.loop, 1
        while loop is not None:
            loop, count = loop.outer, count * loop.length
        return count

    @property
    def x(self) -> int:
        """Value id of the activation of a weighted op."""
        assert self.layer is not None
        value = self.inputs[self.layer.x_position]
        assert isinstance(value, int)
        return value

    def bind(self, read: Callable[[Atom], Any]) -> Op:
        """A weighted op as a function of its activation and weight alone.

        Args:
          read: gives the value of any other operand: of what selects experts.
        """
        others = [read(atom) for atom in self.inputs[2:]]
        return self._replace(call=lambda *both: self.call(*both, *others)) if others else self


class Slice(NamedTuple):
    """The part of stacked weights that one step of an unrolled loop reads.

    Attributes:
      path: of the stacked weight, with the step: ``layers/kernel[3]``.
      stack: value id of the stacked values, which depend on no input.
      index: the step.
    """

    path: str
    stack: int
    index: int


class Graph(NamedTuple):
    """A flat network.

    Attributes:
      ops: in topological order, including static ones, which do not depend on the input.
      inputs: value ids of the input's leaves.
      variables: path of every leaf of the variables, by value id.
      constants: arrays that the function closed over, by value id.
      slices: of stacked weights, by value id.
      outputs: value ids (or literals) of the output's leaves.
      avals: shape and dtype of every value.
      dynamic: ids that depend on the input.
      weight_dependent: ids that depend on the input and on a weight.
      tree: tree definition of the output.
      position_axes: the axes that number the positions of a padded sequence, by value id; see
        `quantize`.
      unquantized: the weighted ops without a layer, in topological order.
      targets: the outputs whose error reconstruction minimises; None for all.
    """

    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    variables: dict[int, str]
    constants: dict[int, Any]
    outputs: tuple[Atom, ...]
    avals: dict[int, Any]
    dynamic: frozenset[int]
    weight_dependent: frozenset[int]
    tree: Any
    position_axes: Mapping[int, tuple[int, ...]] = MappingProxyType({})
    slices: Mapping[int, Slice] = MappingProxyType({})
    unquantized: tuple[Unquantized, ...] = ()
    targets: tuple[Atom, ...] | None = None

    @property
    def samples(self) -> Any:
        """The number of samples of the inputs."""
        shapes = (self.avals[value].shape for value in self.inputs)
        return next(shape[0] for shape in shapes if shape)

    @property
    def target_outputs(self) -> tuple[Atom, ...]:
        """The outputs whose error reconstruction minimises."""
        return self.outputs if self.targets is None else self.targets

    @property
    def paths(self) -> dict[int, str]:
        """Paths of the leaves of the variables, and of the slices of stacked ones, by value id."""
        return {**self.variables, **{i: part.path for i, part in self.slices.items()}}

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of the weighted ops, in topological order."""
        return tuple(op.layer for op in self.ops if op.layer is not None)

    def consumers(self) -> dict[int, list[int]]:
        """Indices of the ops that read each value."""
        table: dict[int, list[int]] = {}
        for index, op in enumerate(self.ops):
            for value in dict.fromkeys(op.reads):
                table.setdefault(value, []).append(index)
        return table

    def producers(self) -> dict[int, Op]:
        """The op that makes each value."""
        return {out: op for op in self.ops for out in op.outputs}


def path_names(tree: Any) -> list[str]:
    """``a/b/kernel`` for every leaf of a pytree, in order; without what NNX and penzai variables
    are made of.

    >>> path_names({("net", "a"): {"kernel": 1, "bias": [2, 3]}})
    ['net/a/bias/0', 'net/a/bias/1', 'net/a/kernel']
    """
    names = ["/".join(map(_key_name, path)) for path, _ in jax.tree.leaves_with_path(tree)]
    short = [name.removesuffix("/data_array").removesuffix("/value") for name in names]
    return short if len(set(short)) == len(set(names)) else names


def _key_name(key: Any) -> str:
    """The name of a key of a pytree; a tuple is a path of its own."""
    if isinstance(getattr(key, "key", None), tuple):
        return "/".join(map(str, key.key))
    return jax.tree_util.keystr((key,), simple=True, separator="/")


def sample_first(graph: Graph, other: Graph) -> frozenset[int]:
    """The values whose first axis, and no other, numbers the samples.

    Args:
      graph: the network.
      other: the same function, traced with more samples.
    """
    samples, sampled = graph.samples, set()
    for value, aval in graph.avals.items():
        shape, more = aval.shape, getattr(other.avals.get(value), "shape", ())
        if shape[:1] == (samples,) and more == (other.samples, *shape[1:]):
            sampled.add(value)
    return frozenset(sampled)


def find_position_axes(
    graph: Graph, other: Graph, sampled: frozenset[int]
) -> dict[int, tuple[int, ...]]:
    """The axes that number the positions of a sequence, of the values that have any.

    Args:
      graph: traced with sequences of some length.
      other: the same function, traced with sequences one shorter.
      sampled: the values whose first axis numbers the samples; only these can have positions.
    """
    position_axes = {}
    for value in sampled:
        shape, less = graph.avals[value].shape, getattr(other.avals.get(value), "shape", ())
        axes = tuple(i for i, (n, m) in enumerate(zip(shape, less, strict=False)) if n == m + 1)
        if axes and len(shape) == len(less) and axes[0] > 0:
            position_axes[value] = axes
    return position_axes
