"""Equations of a jaxpr: what they call, what is inside them, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.extend.core as jex

from aquant_jax.graph.ir import INVERSE, PRODUCTS, TRANSFORM

# From JAX 0.11 on, this is `Jaxpr`, and the types of JAX do not export the old name.
ClosedJaxpr = jex.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

_INLINED = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "remat"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
INLINED_CALLS = _INLINED | _CUSTOM


def closed_jaxpr(jaxpr: Any) -> ClosedJaxpr:
    """`jaxpr` as a closed one."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def scan_parts(eqn: jex.JaxprEqn, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The constants, the carries and the stacked values among the operands of a `scan`."""
    if "ft_in" in eqn.params:  # JAX 0.12
        consts, carries, _ = (len(list(part)) for part in eqn.params["ft_in"].unpack())
    else:
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    end = consts + carries
    return list(values[:consts]), list(values[consts:end]), list(values[end:])


def inner_jaxpr(eqn: jex.JaxprEqn) -> ClosedJaxpr | None:
    """The jaxpr that a call, or a loop of one body, runs; None for any other equation."""
    keys = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next((closed_jaxpr(eqn.params[key]) for key in keys if key in eqn.params), None)


def called(eqn: jex.JaxprEqn, custom_gradients: bool) -> ClosedJaxpr | None:
    """The closed jaxpr that an equation calls, or None where the call is not inlined."""
    name = eqn.primitive.name
    inner = inner_jaxpr(eqn) if name in INLINED_CALLS else None
    if inner is None or (custom_gradients and is_transform(eqn)):
        return None
    # Inlining loses a custom gradient (relu'(0) would be 0.5), so only weighted ops justify it.
    if custom_gradients and name in _CUSTOM and not _contains_weighted(inner.jaxpr):
        return None
    return inner


def is_transform(eqn: jex.JaxprEqn) -> bool:
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
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def primitives(eqn: jex.JaxprEqn) -> frozenset[str]:
    """Names of the primitives inside an equation, or of its own where it has no inner jaxprs."""
    inner = [primitives(e) for jaxpr in _inner_jaxprs(eqn) for e in jaxpr.eqns]
    return frozenset().union(*inner) if inner else frozenset({eqn.primitive.name})


def nested(eqn: jex.JaxprEqn) -> frozenset[str]:
    """Names of the primitives inside an equation, at any depth."""
    inner = [e for jaxpr in _inner_jaxprs(eqn) for e in jaxpr.eqns]
    return frozenset(e.primitive.name for e in inner).union(*map(nested, inner))


def function_of(eqn: jex.JaxprEqn, template: jex.Jaxpr) -> Callable[..., list[Any]]:
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
    function = jex.jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))
    return lambda *operands: function(*(operands[i] for i in first))
