"""Which ops of a network a quantized layer's epilogue absorbs, and what its readers want of it.

Codes pass between two layers, not floats, where the graph allows it: a layer adds the residual,
clips, and quantizes for its readers, before its sums leave the cache. The rules look at ops alone:

- an addition of two values of the same shape, the other of which is then the residual;
- a clip: maximum, minimum, or a function of these such as ``jax.nn.relu6``;
- of a convolution, a maximum over windows, behind which it absorbs nothing more;
- each only where nothing else reads the value before it, and where it is not quantized there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from aquant_jax.graph.ir import ALIASES, Atom, Literal, Op
from aquant_jax.layers.conv_geometry import ConvGeometry
from aquant_jax.layers.fake_quant import LayerSpec, needs_columns
from aquant_jax.layers.integer import in_integers, keeps_layout
from aquant_jax.plan.block_program import BlockProgram

NEAREST = ""  # the reader of codes that are rounded to nearest; others are paths of layers
EVERYTHING = (-math.inf, math.inf)
CONVERT = "convert_element_type"
CALLS = {"custom_jvp_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr"}


class Fusion(NamedTuple):
    """A quantized layer and the ops that it absorbs.

    Attributes:
      op: the layer's.
      last: the op after which it runs, when all that it reads is known.
      result: value id of what it gives.
      residual: value id of what it adds; None for nothing.
      low, high: what it clips to.
      pool: windows whose maximum it takes; None for none.
    """

    op: Op
    last: Op
    result: int
    residual: int | None = None
    low: float = -math.inf
    high: float = math.inf
    pool: ConvGeometry | None = None


class Wanted(NamedTuple):
    """What the readers of a value want.

    Attributes:
      values: whether it is read as floats.
      readers: readers of its codes: paths of layers with one border a channel, and `NEAREST`.
    """

    values: bool
    readers: tuple[str, ...]


class FusionPlan(NamedTuple):
    """How a network runs in integers.

    Attributes:
      fusions: by the output of their last op.
      absorbed: outputs of the ops that others absorb.
      wanted: what is wanted of every value that a layer gives.
    """

    fusions: dict[int, Fusion]
    absorbed: frozenset[int]
    wanted: dict[int, Wanted]


def plan_fusions(program: BlockProgram) -> FusionPlan:
    """The fusions of a network whose layers run in integers where they can."""
    fusions: dict[int, Fusion] = {}
    taken: set[int] = set()
    readers: dict[int, list[Op]] = {}
    for op in program.subgraph.ops:
        for value in dict.fromkeys(op.reads):
            readers.setdefault(value, []).append(op)
    for op, spec in zip(program.subgraph.weighted, program.specs, strict=True):
        if not in_integers(op, spec):
            continue
        fusion, inside = _fuse(program, readers, op, taken)
        fusions[fusion.result] = fusion
        taken.update(inside)
    specs = {spec.path: spec for spec in program.specs}
    wanted = {r: _wanted(program, specs, r, readers.get(r, ())) for r in fusions}
    return FusionPlan(fusions, frozenset(taken - fusions.keys()), wanted)


def reads_codes(program: BlockProgram, op: Op, spec: LayerSpec, value: int) -> bool:
    """Whether a layer's activation has one code an element, whatever reads it, and `value` is that
    activation as it stands."""
    if op.x != value or not in_integers(op, spec) or not keeps_layout(op):
        return False
    if program.avals[value].dtype != jnp.float32:
        return False
    return spec.border is None or not needs_columns(op, spec)


def _fuse(
    program: BlockProgram, readers: Mapping[int, Sequence[Op]], op: Op, taken: set[int]
) -> tuple[Fusion, list[int]]:
    """The fusion of a layer, and the outputs of the ops inside it."""
    fusion, inside = Fusion(op, op, op.outputs[0]), [op.outputs[0]]
    while keeps_layout(op) and fusion.pool is None:
        reader = _only_reader(program, readers, fusion.result)
        if reader is None:
            break
        out = reader.outputs[0]
        longer = _longer(program, fusion, reader) if reader.loop == op.loop else None
        if longer is None or out in taken:
            break
        fusion = longer._replace(last=reader, result=out)
        inside.append(out)
    return fusion, inside


def _only_reader(
    program: BlockProgram, readers: Mapping[int, Sequence[Op]], value: int
) -> Op | None:
    """The op that alone reads a float32 value, which is no output."""
    if value in program.subgraph.outputs or program.avals[value].dtype != jnp.float32:
        return None
    found = readers.get(value, ())
    return found[0] if len(found) == 1 and found[0].layer is None else None


def _longer(program: BlockProgram, fusion: Fusion, op: Op) -> Fusion | None:
    """`fusion` with `op` behind, or None where the epilogue cannot do that."""
    shape = program.avals[fusion.result].shape
    if op.name == "reduce_window_max":  # which passes a quantized tensor on as it stands
        pool = _pool(op, shape) if fusion.op.layer.kind == "conv" else None
        return None if pool is None else fusion._replace(pool=pool)
    quantized = fusion.result in program.tensor_of
    if quantized or len(op.outputs) != 1 or program.avals[op.outputs[0]].shape != shape:
        return None
    clipped = (fusion.low, fusion.high) != EVERYTHING
    if op.name in ("add", "add_any") and fusion.residual is None and not clipped:
        others = [atom for atom in op.inputs if atom != fusion.result]
        if len(others) != 1 or not isinstance(others[0], int):
            return None
        aval = program.avals[others[0]]
        same = aval.shape == shape and aval.dtype == jnp.float32
        return fusion._replace(residual=others[0]) if same else None
    bounds = clip_bounds(op, program.producers)
    if bounds is None:
        return None
    low, high = _both((fusion.low, fusion.high), bounds)
    return fusion._replace(low=low, high=high)


def _pool(op: Op, shape: tuple[int, ...]) -> ConvGeometry | None:
    """The windows of a maximum over the spatial axes of ``[N, *spatial, C]``, or None."""
    names = ("window_dimensions", "window_strides", "window_dilation", "base_dilation")
    window, strides, dilation, base = (tuple(op.params[name]) for name in names)
    padding = tuple(tuple(pair) for pair in op.params["padding"])
    ends = {*window[:: len(shape) - 1], *strides[:: len(shape) - 1]}
    if len(shape) < 3 or ends != {1} or padding[0] != (0, 0) or padding[-1] != (0, 0):
        return None
    if set(base) != {1} or min(end for pair in padding for end in pair) < 0:
        return None
    inner = slice(1, -1)
    pool = ConvGeometry(
        shape[inner], window[inner], strides[inner], dilation[inner], padding[inner]
    )
    return pool if min(pool.out) > 0 else None


def clip_bounds(op: Op, producers: Mapping[int, Op]) -> tuple[float, float] | None:
    """(low, high) of an op that clips one value to numbers, or None.

    Args:
      op: any op without a weight.
      producers: the op that makes each value: a number may be converted first.
    """
    if op.name in CALLS:
        return _jaxpr_bounds(op.params[CALLS[op.name]])

    def number(atom: Atom) -> float | None:
        if not isinstance(atom, int):
            return _number(atom)
        source = producers.get(atom)
        if source is None or source.name != CONVERT or isinstance(source.inputs[0], int):
            return None
        return _number(source.inputs[0])

    return _bounds(op.name, op.inputs, number)


def _jaxpr_bounds(closed: Any) -> tuple[float, float] | None:
    """The same of a function with one argument, as JAX traces it."""
    jaxpr = closed.jaxpr
    if len(jaxpr.invars) != 1 or len(jaxpr.outvars) != 1:
        return None
    value, bounds = jaxpr.invars[0], EVERYTHING
    converted: dict[int, float | None] = {}  # literals, by the id of their variable

    def number(atom: Any) -> float | None:
        return converted.get(id(atom), _number(atom))

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, equation.invars
        if name == CONVERT and operands[0] is not value:
            converted[id(equation.outvars[0])] = _number(operands[0])
            continue
        if name in CALLS and operands == [value]:
            next_bounds = _jaxpr_bounds(equation.params[CALLS[name]])
        else:
            reads = [atom for atom in operands if number(atom) is None]
            next_bounds = _bounds(name, operands, number) if reads == [value] else None
        if next_bounds is None:
            return None
        bounds, value = _both(bounds, next_bounds), equation.outvars[0]
    return bounds if value is jaxpr.outvars[0] else None


def _both(first: tuple[float, float], then: tuple[float, float]) -> tuple[float, float]:
    """The bounds of two clips in a row: the ends of the first, clipped by the second."""
    low, high = then
    return min(max(first[0], low), high), max(min(first[1], high), low)


def _bounds(
    name: str, operands: Sequence[Any], number: Callable[[Any], float | None]
) -> tuple[float, float] | None:
    """The bounds of one equation; `number` is None for its value and for what is no number."""
    numbers = [number(atom) for atom in operands]
    if name in ("max", "min") and numbers.count(None) == 1:
        (bound,) = (n for n in numbers if n is not None)
        return (bound, math.inf) if name == "max" else (-math.inf, bound)
    if name == "clamp" and [n is None for n in numbers] == [False, True, False]:
        low, _, high = numbers
        assert low is not None
        assert high is not None
        return low, max(low, high)
    return None


def _number(atom: Any) -> float | None:
    """The value of a literal that is a single number."""
    if not isinstance(atom, Literal) or np.size(atom.val) != 1 or np.iscomplexobj(atom.val):
        return None
    number = float(np.reshape(atom.val, ()))
    return None if math.isnan(number) else number


def _wanted(
    program: BlockProgram, specs: Mapping[str, LayerSpec], value: int, ops: Sequence[Op]
) -> Wanted:
    """What `ops`, the readers of `value`, want."""
    values, quantized = value in program.subgraph.outputs, value in program.tensor_of
    readers: list[str] = []
    for op in ops:
        spec = None if op.layer is None else specs[op.layer.path]
        if spec is None and quantized and op.name not in ALIASES:
            readers.append(NEAREST)
        elif spec is not None and quantized and reads_codes(program, op, spec, value):
            readers.append(spec.path if spec.border else NEAREST)
        else:
            values = True
    return Wanted(values, tuple(dict.fromkeys(readers)))
