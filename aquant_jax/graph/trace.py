"""Tracing of an inference function into a `Graph`.

Only this module, `control_flow`, `shards` and `equations` read jaxprs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.graph.control_flow import Kind, flatten_control_flow
from aquant_jax.graph.equations import (
    ClosedJaxpr,
    called,
    function_of,
    is_transform,
    nested,
    primitives,
)
from aquant_jax.graph.experts import Selections, without_selections
from aquant_jax.graph.ir import (
    PAD_WITH_VALUE,
    PRODUCTS,
    STATIC_GATHER,
    TO_COMPLEX,
    Atom,
    Graph,
    Layer,
    Loop,
    Op,
    Slice,
    Unquantized,
    path_names,
)
from aquant_jax.graph.shards import SHARD_MAP, unsharded
from aquant_jax.graph.weighted_ops import SPARSE, layer_of, opaque

MOST_SHOWN = 8  # shapes in a message


def trace(apply: Callable[..., Any], variables: Any, x: Any, trainable: bool = True) -> Graph:
    """Trace ``apply(variables, x)`` into a flat graph.

    Args:
      apply: any inference function that JAX can trace.
      variables: pytree of arrays; its paths name the weights.
      x: pytree of arrays or ``ShapeDtypeStruct`` with a leading batch axis.
      trainable: whether it is quantized and differentiated: a function with a gradient of its own
        is then one op, and there is a weighted op. Otherwise all calls are inlined.

    Raises:
      InputError: `apply` cannot be traced with `x`, or has no weighted op that can be quantized.
    """
    try:
        closed, out_shape = jax.make_jaxpr(apply, return_shape=True)(variables, x)
    except Exception as error:  # frameworks raise various types for a wrong shape
        leaves = jax.tree.leaves(x)
        shapes = [f"{a.dtype}{list(a.shape)}" for a in leaves[:MOST_SHOWN]]
        if len(leaves) > MOST_SHOWN:
            shapes.append(f"{len(leaves) - MOST_SHOWN} more")
        text = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"apply(variables, x) fails for x of {shapes}: {text}") from error
    return _Flattener(closed, variables, jax.tree.structure(out_shape), trainable).graph()


class _Flattener:
    """Inlines calls, numbers the values and finds the weighted ops."""

    def __init__(self, closed: ClosedJaxpr, variables: Any, tree: Any, trainable: bool) -> None:
        self.closed, self.tree, self.trainable = closed, tree, trainable
        self.names = path_names(variables)
        self.avals: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}
        self.ops: list[Op] = []
        self.dynamic: set[int] = set()
        self.weight_dependent: set[int] = set()
        self.scalars: dict[int, Any] = {}
        # Static value -> the variables, slices of them and closed-over arrays that it depends on.
        self.static_of: dict[int, set[int]] = {}
        self.closed_over: set[int] = set()
        self.path_of: dict[int, str] = {}  # of those
        self.selected = Selections(self.avals)
        self.used: dict[str, int] = {}  # how often, by the path of a weight
        self.sliced: dict[str, int] = {}  # likewise, of a slice
        self.slices: dict[int, Slice] = {}
        self.slice_ids: dict[tuple[int, int], int] = {}  # by stack and index
        self.loops = 0  # number of loops so far
        self.loop: Loop | None = None  # the innermost that stays rolled
        self.iteration = ""  # of the loops that are unrolled
        self.region: list[Op] = []  # of the outermost rolled loop
        self.unquantized: list[Unquantized] = []

    def graph(self) -> Graph:
        """The graph of the traced function."""
        jaxpr = self.closed.jaxpr
        ids = [self.new(var.aval) for var in jaxpr.invars]
        weights, inputs = ids[: len(self.names)], ids[len(self.names) :]
        variables = dict(zip(weights, self.names, strict=True))
        self.path_of.update(variables)
        self.static_of.update({i: {i} for i in weights})
        self.dynamic.update(inputs)
        outputs = self.flatten(self.closed, ids)
        self.ops = without_selections(self.ops, outputs)
        layers = [op.layer for op in self.ops if op.layer]
        if self.trainable and all(self.static_of[i.weight] <= self.closed_over for i in layers):
            raise InputError(self._no_layer())
        return Graph(
            tuple(self.ops), tuple(inputs), variables, self.constants, tuple(outputs),
            self.avals, frozenset(self.dynamic), frozenset(self.weight_dependent), self.tree,
            slices=self.slices, unquantized=tuple(self.unquantized),
        )  # fmt: skip

    def _no_layer(self) -> str:
        """Why nothing of the model can be quantized."""
        if self.unquantized:
            reasons = "; ".join(map(str, self.unquantized))
            return f"no weighted op of the model can be quantized: {reasons}"
        return (
            "the model has no weighted op: no conv or dot takes a weight from `variables` "
            f"({len(self.names)} leaves) and an operand that depends on x"
        )

    def new(self, aval: Any) -> int:
        """The id of a new value."""
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def flatten(self, closed: ClosedJaxpr, inputs: Sequence[Atom]) -> list[Atom]:
        """Appends the equations of a jaxpr, whose calls are inlined.

        Args:
          closed: the jaxpr.
          inputs: the atoms of its inputs.

        Returns:
          The atoms of its outputs.
        """
        jaxpr = closed.jaxpr
        constants = [self.new(var.aval) for var in jaxpr.constvars]
        self.constants.update(zip(constants, closed.consts, strict=True))
        for value, array in zip(constants, closed.consts, strict=True):
            if np.ndim(array) > 1 and jnp.issubdtype(jnp.result_type(array), jnp.inexact):
                self.path_of[value] = f"closed_over/{len(self.closed_over)}"
                self.static_of[value] = {value}
                self.closed_over.add(value)
        names = [*jaxpr.constvars, *jaxpr.invars]
        env: dict[Any, Atom] = dict(zip(names, [*constants, *inputs], strict=True))

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            is_sharded = eqn.primitive.name == SHARD_MAP
            inner = unsharded(eqn) if is_sharded else called(eqn, self.trainable)
            if inner is not None:
                outputs = self.flatten(inner, operands)
            else:
                outputs = flatten_control_flow(self, eqn, operands)
            if outputs is None:
                outputs = self._append(eqn, tuple(operands))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def append(self, op: Op, dynamic: bool, weight: bool) -> None:
        """Appends one op; what depends on no input leaves the loop that it is part of."""
        if dynamic:
            self.dynamic.update(op.outputs)
            if weight:
                self.weight_dependent.update(op.outputs)
        (self.region if dynamic and self.loop else self.ops).append(op)

    def close_loop(self) -> None:
        """Ends a rolled loop."""
        if self.loop is None:
            self.ops += self.region
            self.region = []

    def kind(self, atom: Atom) -> Kind:
        """On what a value depends."""
        if not isinstance(atom, int):
            return Kind()
        weight = bool(self.static_of.get(atom)) or atom in self.weight_dependent
        return Kind(atom in self.dynamic, weight, selected=atom in self.selected.of)

    def slice_of(self, stack: int, index: int) -> int:
        """A slice of stacked weights, as a weight of its own."""
        key = stack, index
        if key not in self.slice_ids:
            aval = self.avals[stack]
            value = self.slice_ids[key] = self.new(aval.update(shape=aval.shape[1:]))
            path = self._numbered(f"{self._path(stack)}[{index}]", self.sliced)
            self.slices[value] = Slice(path, stack, index)
            self.path_of[value] = path
            self.static_of[value] = {value}
        return self.slice_ids[key]

    def _append(self, eqn: jex.JaxprEqn, inputs: tuple[Any, ...]) -> list[Atom]:
        """Appends one equation, and records on what its outputs depend."""
        outputs = tuple(self.new(var.aval) for var in eqn.outvars)
        ids = [i for i in inputs if isinstance(i, int)]
        made_of = set().union(*(self.static_of.get(i, set()) for i in ids)) if ids else set()
        dynamic = any(i in self.dynamic for i in ids)
        layer = self._layer(eqn, inputs) if dynamic else None
        if not dynamic:
            self.static_of.update(dict.fromkeys(outputs, made_of))
        call = function_of(eqn, self.closed.jaxpr)
        params = dict(eqn.params)
        if layer:
            avals: list[Any] = [atom.aval for atom in eqn.invars[:2]]
            params["operand_dtypes"] = tuple(aval.dtype for aval in avals)
        name = eqn.params["name"] if is_transform(eqn) else eqn.primitive.name
        if name == "pad" and self._scalar(inputs[1]) not in (0, -np.inf):
            name = PAD_WITH_VALUE
        if name == "gather" and [i for i in ids if i in self.dynamic] == [inputs[0]]:
            name = STATIC_GATHER
        if name == "convert_element_type" and not dynamic:
            self.scalars[outputs[0]] = self._scalar(inputs[0])
        if name == "convert_element_type" and params["new_dtype"].kind == "c":
            name = TO_COMPLEX
        place = self.loop if dynamic else None, self.iteration
        op = Op(name, params, call, inputs, outputs, layer, primitives(eqn), *place)
        if dynamic and layer is None:
            op = self._experts(op) or self._note(eqn, op)
        of_weight = op.layer or made_of - self.closed_over or self.weight_dependent & {*ids}
        self.append(op, dynamic, bool(of_weight))
        return list(outputs)

    def _scalar(self, value: Atom) -> Any:
        """The number in a literal, in a constant or in a conversion of one; None if unknown."""
        if not isinstance(value, int):
            return value.val
        constant = self.constants.get(value)
        return self.scalars.get(value) if constant is None or np.ndim(constant) else constant

    def _layer(self, eqn: jex.JaxprEqn, inputs: Sequence[Any]) -> Layer | None:
        """The layer of a conv or dot with a static operand; None for any other equation, and for
        one that cannot be quantized, which it notes."""
        if eqn.primitive.name not in PRODUCTS:
            return None
        weighted = [
            side for side in (0, 1)
            if isinstance(inputs[side], int) and self.static_of.get(inputs[side])
            and 0 not in self.avals[inputs[side]].shape and inputs[1 - side] in self.dynamic
        ]  # fmt: skip
        if not weighted:
            return None
        weight, params = inputs[weighted[0]], eqn.params
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        path = self._name(weight)
        found = layer_of(eqn.primitive.name, params, path, weight, weighted[0], avals)
        if isinstance(found, Layer):
            return found
        self.unquantized.append(found)
        return None

    def _experts(self, op: Op) -> Op | None:
        """A product with weights that the input selects as a weighted op; None for another op."""
        product = self.selected.multiplied(op) if self.dynamic.issuperset(op.reads) else None
        if product is None or not jnp.issubdtype(self.avals[op.outputs[0]].dtype, jnp.inexact):
            return None
        return product._replace(layer=product.layer._replace(path=self._name(product.layer.weight)))

    def _note(self, eqn: jex.JaxprEqn, op: Op) -> Op:
        """Notes an op with weights that no layer stands for, and what of them the input selects."""
        name, ids = op.name, [i for i in op.inputs if isinstance(i, int)]
        axes = 1 if name in SPARSE else 2  # of a weight, at least
        weights = [i for i in ids if self.static_of.get(i) and len(self.avals[i].shape) >= axes]
        reason = opaque(name, nested(eqn))
        if reason is not None and weights:
            floats = [i for i in weights if jnp.issubdtype(self.avals[i].dtype, jnp.inexact)]
            largest = max(floats or weights, key=lambda i: self.avals[i].size)
            self.unquantized.append(Unquantized(self._name(largest), name, reason))
        chosen = self.selected.largest(op)
        if name in PRODUCTS and chosen is not None:
            self.unquantized.append(Unquantized(self._name(chosen.stack), name, chosen.reason))
        variables = set().union(*(self.static_of[i] for i in weights))
        self.selected.follow(op, weights, len(variables))
        return op

    def _path(self, weight: int) -> str:
        """Path of the largest variable, or slice of one, in the operand; else of an array."""
        found = self.static_of[weight]
        candidates = found - self.closed_over or found
        return self.path_of[max(candidates, key=lambda i: self.avals[i].size)]

    def _name(self, weight: int) -> str:
        """`_path`, numbered when it is reused."""
        return self._numbered(self._path(weight), self.used)

    def _numbered(self, path: str, used: dict[str, int]) -> str:
        """`path`, numbered when it is used again, as another path may be that has a number."""
        used[path] = used.get(path, 0) + 1
        return path if used[path] == 1 else self._numbered(f"{path}#{used[path]}", used)
