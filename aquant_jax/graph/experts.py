"""Stacked weights of which the input selects some, as a router does with those of experts.

The op that selects, the views behind it and the product are one weighted op, whose weight is the
whole stack: every expert has grids of its own, and all share the borders of an input channel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aquant_jax.graph.ir import ALIASES, SHAPE_ONLY, Atom, Layer, Op

SELECTS = {"gather", "dynamic_slice"}
VIEWS = SHAPE_ONLY | {"broadcast_in_dim", "convert_element_type"}
DOT = "dot_general"
FOR_EVERY_SAMPLE = "the input selects it for every sample, as jax.vmap of a cond does"

Axes = tuple[int | None, ...]  # for each axis of a value, that of the stack; None for no axis of it
Avals = Mapping[int, Any]  # shape and dtype of every value


class Selection(NamedTuple):
    """A value that consists of selected parts of a stack.

    Attributes:
      stack: value id of the stack, which depends on no input.
      axes: of the stack, by axis of the value; None where they are not known.
      ops: the one that selects, and the views behind it.
      reason: why a product with it stays float, where it is no layer.
    """

    stack: int
    axes: Axes | None
    ops: tuple[Op, ...]
    reason: str = "the input selects its weights"

    @property
    def others(self) -> tuple[Atom, ...]:
        """The operands that are no part of the stack, such as indices."""
        return tuple(itertools.chain.from_iterable(op.inputs[1:] for op in self.ops))

    def select(self, stack: Any, others: Sequence[Any]) -> Any:
        """The selected parts of a stack."""
        rest = iter(others)
        for op in self.ops:
            (stack,) = op.call(stack, *itertools.islice(rest, len(op.inputs) - 1))
        return stack


class Selections:
    """The selections of a trace under way.

    Attributes:
      of: them, by value id.
    """

    def __init__(self, avals: Avals) -> None:
        self.avals = avals
        self.of: dict[int, Selection] = {}

    def largest(self, op: Op) -> Selection | None:
        """What the op reads of the largest stack that is selected of; None for none."""
        read = [self.of[i] for i in op.reads if i in self.of]
        return max(read, key=lambda found: self.avals[found.stack].size, default=None)

    def multiplied(self, op: Op) -> Op | None:
        """A product with a selection, of the largest stack, as a weighted op without a path; None
        for any other op."""
        found = {side: self.of[i] for side, i in enumerate(op.reads) if i in self.of}
        if op.name != DOT or not found:
            return None
        side = max(found, key=lambda side: self.avals[found[side].stack].size)
        return _multiplied(op, side, found[side], self.avals)

    def follow(self, op: Op, weights: Sequence[int], variables: int) -> None:
        """Notes what an op, which reads `weights` of so many variables, selects, or passes on."""
        source, out = op.inputs[0], op.outputs[0]
        if op.name in SELECTS and source in weights:
            self.of[out] = _select(op, self.avals)
        elif op.name == "select_n" and weights:
            found = Selection(weights[0], None, ())
            self.of[out] = found._replace(reason=FOR_EVERY_SAMPLE) if variables == 1 else found
        elif op.name in VIEWS | ALIASES and isinstance(source, int) and source in self.of:
            selection = self.of[source]
            axes = None if selection.axes is None else _view(op, selection.axes, self.avals)
            self.of[out] = selection._replace(axes=axes, ops=(*selection.ops, op))


def _select(op: Op, avals: Avals) -> Selection:
    """What an op of `SELECTS` selects of its first operand."""
    stack = op.inputs[0]
    assert isinstance(stack, int)
    shape = avals[stack].shape
    sizes, rank = op.params["slice_sizes"], len(shape)
    axes: Axes = tuple(a if sizes[a] == shape[a] else None for a in range(rank))
    if op.name == "gather":
        numbers = op.params["dimension_numbers"]
        dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = iter(axis for axis in range(rank) if axis not in dropped)
        places = set(numbers.offset_dims)
        rank = avals[op.outputs[0]].ndim
        axes = tuple(axes[next(kept)] if i in places else None for i in range(rank))
    return Selection(stack, axes, (op,))


def _view(op: Op, axes: Axes, avals: Avals) -> Axes | None:
    """The axes behind a view; None behind one that mixes them."""
    params, (before,), (after,) = op.params, op.reads[:1], op.outputs
    if op.name == "transpose":
        return tuple(axes[i] for i in params["permutation"])
    if op.name == "broadcast_in_dim":
        own = dict(zip(params["broadcast_dimensions"], axes, strict=True))
        return tuple(own.get(i) for i in range(avals[after].ndim))
    if op.name in ("reshape", "squeeze", "expand_dims"):  # of axes of one element only
        shapes = avals[before].shape, avals[after].shape
        wide = iter([axis for axis, n in zip(axes, shapes[0], strict=True) if n != 1])
        same = [n for n in shapes[0] if n != 1] == [n for n in shapes[1] if n != 1]
        return tuple(None if n == 1 else next(wide) for n in shapes[1]) if same else None
    return axes if op.name in ("convert_element_type", "copy", "copy_p") else None


def _multiplied(op: Op, side: int, selection: Selection, avals: Avals) -> Op | None:
    """The weighted op of a dot with a selection.

    Args:
      op: the product.
      side: the place of the selection among its operands.
      selection: that operand.
      avals: of the values.

    Returns:
      It reads the activation, the stack, and what selects; its layer has no path yet. None for a
      product that sums over no axis of the stack.
    """
    axes, x = selection.axes, op.inputs[1 - side]
    if axes is None:
        return None
    contract, batch = op.params["dimension_numbers"]
    summed = {axes[own] for own in contract[side]} - {None}
    if not summed:
        return None
    own_axes, axes_of_x = ((*batch[i], *contract[i]) for i in (side, 1 - side))
    pairs = zip(own_axes, axes_of_x, strict=True)
    column_axes = tuple(other for own, other in pairs if axes[own] is not None)
    free = [a for a in range(len(axes)) if a not in (*contract[side], *batch[side])]
    first = avals[op.outputs[0]].ndim - len(free) if side == 1 else len(batch[side])
    output_axes = tuple(first + i for i, a in enumerate(free) if axes[a] is not None)
    shape = avals[selection.stack].shape
    channel_axes = tuple(axis for axis in range(len(shape)) if axis not in summed)
    layer = Layer("", "experts", selection.stack, shape, channel_axes, output_axes, column_axes, 0)

    def call(value: Any, stack: Any, *others: Any) -> list[Any]:
        chosen = selection.select(stack, others)
        return op.call(*((value, chosen) if side == 1 else (chosen, value)))

    assert isinstance(x, int)
    dtypes = avals[x].dtype, avals[selection.stack].dtype
    chosen_by = tuple((step.name, step.params) for step in selection.ops)
    return op._replace(
        params={**op.params, "selected_by": chosen_by, "operand_dtypes": dtypes},
        call=call, inputs=(x, selection.stack, *selection.others), layer=layer,
    )  # fmt: skip


def without_selections(ops: Sequence[Op], outputs: Sequence[Atom]) -> list[Op]:
    """The ops without those that select experts, or view them, for weighted ops alone."""
    if all(op.layer is None or op.layer.kind != "experts" for op in ops):
        return list(ops)
    read = {out for out in outputs if isinstance(out, int)}
    kept: list[Op] = []
    for op in reversed(ops):
        if op.name in SELECTS | VIEWS and not read.intersection(op.outputs):
            continue
        read.update(i for i in op.inputs if isinstance(i, int))
        kept.append(op)
    return kept[::-1]
