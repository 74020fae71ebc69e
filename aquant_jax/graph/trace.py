"""Tracing of an inference function into a `Graph`. No other module reads jaxprs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.graph.ir import (
    INVERSE,
    PAD_WITH_VALUE,
    PRODUCTS,
    STATIC_GATHER,
    TO_COMPLEX,
    TRANSFORM,
    Atom,
    Graph,
    Layer,
    Op,
    Unquantized,
    path_names,
)
from aquant_jax.graph.weighted_ops import layer_of

_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_LOOPS = {"scan", "while", "cond"}


def trace(apply: Callable[..., Any], variables: Any, x: Any, trainable: bool = True) -> Graph:
    """Trace ``apply(variables, x)`` into a flat graph.

    Args:
      apply: any inference function that JAX can trace.
      variables: pytree of arrays; its paths name the weights.
      x: pytree of arrays or ``ShapeDtypeStruct`` with a leading batch axis.
      trainable: whether it is quantized and differentiated: a function with a gradient of its own
        is then one op, and there is a weighted op. Otherwise all calls are inlined.

    Raises:
      InputError: `apply` cannot be traced with `x`, a weighted op is in a loop, or there is none
        that can be quantized.
    """
    try:
        closed, out_shape = jax.make_jaxpr(apply, return_shape=True)(variables, x)
    except Exception as error:  # frameworks raise various types for a wrong shape
        shapes = [f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(x)]
        raise InputError(f"apply(variables, x) fails for x of {shapes}: {error}") from error
    return _Flattener(closed, variables, jax.tree.structure(out_shape), trainable).graph()


class _Flattener:
    """Inlines calls, numbers the values and finds the weighted ops."""

    def __init__(self, closed: jex.ClosedJaxpr, variables: Any, tree: Any, trainable: bool) -> None:
        self.closed, self.tree, self.trainable = closed, tree, trainable
        self.names = path_names(variables)
        self.avals: dict[int, Any] = {}
        self.constants: dict[int, Any] = {}
        self.ops: list[Op] = []
        self.dynamic: set[int] = set()
        self.weight_dependent: set[int] = set()
        self.scalars: dict[int, Any] = {}
        self.static_of: dict[int, set[int]] = {}  # static value -> the variables it depends on
        self.used: dict[str, int] = {}
        self.unquantized: list[Unquantized] = []

    def graph(self) -> Graph:
        """The graph of the traced function."""
        jaxpr = self.closed.jaxpr
        constants = [self._new(var.aval) for var in jaxpr.constvars]
        self.constants.update(zip(constants, self.closed.consts, strict=True))
        ids = [self._new(var.aval) for var in jaxpr.invars]
        weights, inputs = ids[: len(self.names)], ids[len(self.names) :]
        self.variables = dict(zip(weights, self.names, strict=True))
        self.static_of.update({i: {i} for i in weights})
        self.dynamic.update(inputs)
        env: dict[Any, Atom] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *ids], strict=True)
        )
        outputs = self._flatten(jaxpr, env)
        if self.trainable and not any(op.layer for op in self.ops):
            raise InputError(self._no_layer())
        return Graph(
            tuple(self.ops), tuple(inputs), self.variables, self.constants, tuple(outputs),
            self.avals, frozenset(self.dynamic), frozenset(self.weight_dependent), self.tree,
            unquantized=tuple(self.unquantized),
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

    def _new(self, aval: Any) -> int:
        """The id of a new value."""
        self.avals[len(self.avals)] = aval
        return len(self.avals) - 1

    def _flatten(self, jaxpr: jex.Jaxpr, env: dict[Any, Atom]) -> list[Atom]:
        """Appends the equations of a jaxpr.

        Args:
          jaxpr: whose calls are inlined.
          env: the atom of each of its variables; grows by those of the equations.

        Returns:
          The atoms of its outputs.
        """

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, jex.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            inner = _called(eqn, self.trainable)
            if inner is not None:
                constants = [self._new(var.aval) for var in inner.jaxpr.constvars]
                self.constants.update(zip(constants, inner.consts, strict=True))
                names = [*inner.jaxpr.constvars, *inner.jaxpr.invars]
                scope = dict(zip(names, [*constants, *inputs], strict=True))
                outputs = self._flatten(inner.jaxpr, scope)
            else:
                outputs = [self._new(var.aval) for var in eqn.outvars]
                self._append(eqn, tuple(inputs), tuple(outputs))
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _append(self, eqn: jex.JaxprEqn, inputs: tuple[Any, ...], outputs: tuple[int, ...]) -> None:
        """Appends one equation, and records on what its outputs depend."""
        ids = [i for i in inputs if isinstance(i, int)]
        made_of = set().union(*(self.static_of.get(i, set()) for i in ids)) if ids else set()
        dynamic = any(i in self.dynamic for i in ids)
        layer = self._layer(eqn, inputs) if dynamic else None
        if dynamic:
            self.dynamic.update(outputs)
            if layer or made_of or any(i in self.weight_dependent for i in ids):
                self.weight_dependent.update(outputs)
            _reject_loop(eqn, inputs, self.static_of)
        else:
            self.static_of.update(dict.fromkeys(outputs, made_of))
        call = _function(eqn, self.closed.jaxpr)
        params = dict(eqn.params)
        if layer:
            avals: list[Any] = [atom.aval for atom in eqn.invars]
            params["operand_dtypes"] = tuple(aval.dtype for aval in avals)
        name = eqn.params["name"] if _is_transform(eqn) else eqn.primitive.name
        if name == "pad" and self._scalar(inputs[1]) not in (0, -np.inf):
            name = PAD_WITH_VALUE
        if name == "gather" and [i for i in ids if i in self.dynamic] == [inputs[0]]:
            name = STATIC_GATHER
        if name == "convert_element_type" and not dynamic:
            self.scalars[outputs[0]] = self._scalar(inputs[0])
        if name == "convert_element_type" and params["new_dtype"].kind == "c":
            name = TO_COMPLEX
        self.ops.append(Op(name, params, call, inputs, outputs, layer, _primitives(eqn)))

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
            and inputs[1 - side] in self.dynamic
        ]  # fmt: skip
        if not weighted:
            return None
        weight, params = inputs[weighted[0]], eqn.params
        avals: list[Any] = [atom.aval for atom in eqn.invars]
        shapes = [aval.shape for aval in avals]
        path = self._name(weight)
        found = layer_of(eqn.primitive.name, params, path, weight, weighted[0], shapes)
        if isinstance(found, Layer):
            return found
        self.unquantized.append(found)
        return None

    def _name(self, weight: int) -> str:
        """Path of the largest variable in the operand, numbered when it is reused."""
        path = self.variables[max(self.static_of[weight], key=lambda i: self.avals[i].size)]
        self.used[path] = self.used.get(path, 0) + 1
        return path if self.used[path] == 1 else f"{path}#{self.used[path]}"


def _called(eqn: jex.JaxprEqn, custom_gradients: bool) -> jex.ClosedJaxpr | None:
    """The closed jaxpr that an equation calls, or None where the call is not inlined."""
    name = eqn.primitive.name
    is_call = name in _INLINED or name in _CUSTOM
    if not is_call or (custom_gradients and _is_transform(eqn)):
        return None
    inner = next(
        eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params
    )
    if not isinstance(inner, jex.ClosedJaxpr):
        inner = jex.ClosedJaxpr(inner, ())
    # Inlining loses a custom gradient (relu'(0) would be 0.5), so only weighted ops justify it.
    if custom_gradients and name in _CUSTOM and not _contains_weighted(inner.jaxpr):
        return None
    return inner


def _is_transform(eqn: jex.JaxprEqn) -> bool:
    return eqn.params.get("name") in (TRANSFORM, INVERSE)


def _contains_weighted(jaxpr: jex.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in PRODUCTS or any(map(_contains_weighted, _inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def _inner_jaxprs(eqn: jex.JaxprEqn) -> Iterator[jex.Jaxpr]:
    """The jaxprs in the parameters of an equation."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def _primitives(eqn: jex.JaxprEqn) -> frozenset[str]:
    """Names of the primitives inside an equation, or of its own where it has no inner jaxprs."""
    inner = [_primitives(e) for jaxpr in _inner_jaxprs(eqn) for e in jaxpr.eqns]
    return frozenset().union(*inner) if inner else frozenset({eqn.primitive.name})


def _reject_loop(
    eqn: jex.JaxprEqn, inputs: Sequence[Any], static_of: Mapping[int, set[int]]
) -> None:
    """InputError for a loop with a weighted op in it."""
    if eqn.primitive.name not in _LOOPS or not any(map(_contains_weighted, _inner_jaxprs(eqn))):
        return
    if any(static_of.get(i) for i in inputs if isinstance(i, int)):
        raise InputError(
            f"a weighted op inside `{eqn.primitive.name}` cannot be quantized: unroll the loop "
            "(flax: scan=False or a Python loop over the layers)"
        )


def _function(eqn: jex.JaxprEqn, template: jex.Jaxpr) -> Callable[..., list[Any]]:
    """The equation as a function of its operands; a closed jaxpr keeps its custom gradients.

    Args:
      eqn: the equation.
      template: the jaxpr whose other fields the new jaxpr takes over.
    """
    variables = list(dict.fromkeys(a for a in eqn.invars if not isinstance(a, jex.Literal)))
    first = [eqn.invars.index(var) for var in variables]
    names = tuple(f"x{i}" for i in range(len(variables)))
    results = tuple(f"y{i}" for i in range(len(eqn.outvars)))
    info = jex.DebugInfo("equation", eqn.primitive.name, names, results)
    jaxpr = template.replace(
        constvars=[], invars=variables, outvars=list(eqn.outvars), eqns=[eqn],
        effects=eqn.effects, debug_info=info,
    )  # fmt: skip
    function = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
    return lambda *operands: function(*(operands[i] for i in first))
