"""What to pass, behind the error of a network that cannot be traced with the caller's arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from aquant_jax.errors import InputError
from aquant_jax.graph.ir import Graph
from aquant_jax.graph.trace import MOST_SHOWN, trace
from aquant_jax.plan.checks import ORDER
from aquant_jax.plan.network import batch_shapes

# By the package of a class of which `apply` is an instance, the most specific first.
FUNCTIONS = {
    "flax.nnx": "graphdef, state = nnx.split(module); "
    "apply = lambda state, x: nnx.merge(graphdef, state)(x)",
    "flax.linen": "apply = module.apply",
    "keras": "apply = lambda variables, x: "
    "model.stateless_call(*variables, x, training=False)[0], where variables are the values of "
    "model.trainable_variables and of model.non_trainable_variables",
    "equinox": "arrays, static = eqx.partition(module, eqx.is_array); "
    "apply = lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)",
}
# Errors of dropout and of batch norm while they train, and of wrong shapes.
TRAINING = "needs PRNG|is immutable|Cannot mutate"
SHAPES = "shape|dim|rank|axis|axes|size|broadcast"


def check_apply(apply: Any) -> None:
    """InputError unless `apply` can be called."""
    if not callable(apply):
        raise InputError(
            f"apply is of type {type(apply).__name__}; it must be a function apply(variables, "
            f"inputs); {ORDER}"
        )


def trace_with_hint(
    apply: Callable[..., Any], variables: Any, calibration: Any, samples: int
) -> Graph:
    """The graph for so many samples of a calibration set.

    Raises:
      InputError: see `trace`; one of `apply` itself ends in what the caller may have meant.
    """
    try:
        return trace(apply, variables, batch_shapes(calibration, samples))
    except InputError as error:
        if error.__cause__ is None:  # apply was traced
            raise
        hint = next(_hints(apply, variables, calibration, error.__cause__), None)
        if hint is None:
            raise
        raise InputError(f"{error}; {hint}") from error.__cause__


def _hints(apply: Any, variables: Any, calibration: Any, cause: BaseException) -> Iterator[str]:
    """What may be wrong, the most certain first."""
    found = _function(apply)
    if found:
        yield f"apply is a {type(apply).__name__}, not a function apply(variables, inputs): {found}"
    if _is_array(variables) and not _is_array(calibration):
        yield f"variables is one array and calibration is a {type(calibration).__name__}: {ORDER}"
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(calibration)]
    if isinstance(calibration, list) and len(shapes) > MOST_SHOWN and len(set(shapes)) == 1:
        yield (
            f"calibration is a list of {len(calibration)}: if these are samples, pass "
            "np.stack(calibration)"
        )
    if isinstance(calibration, tuple | list):
        yield (
            f"calibration is a {type(calibration).__name__} of {len(calibration)}: it must be what "
            "apply takes as its inputs, without labels"
        )
    if re.search(TRAINING, str(cause)):
        yield "the network must be in inference mode, such as train=False, or module.eval() of nnx"
    if re.search(SHAPES, str(cause)) and not isinstance(cause, jax.errors.JAXTypeError):
        count = next(shape[0] for shape in shapes if shape)
        yield f"axis 0 of calibration must number the samples, of which it has {count}"


def _function(apply: Any) -> str | None:
    """How a function is made of a module of a known framework."""
    modules = [f"{cls.__module__}." for cls in type(apply).__mro__]
    names = (n for n in FUNCTIONS if any(module.startswith(f"{n}.") for module in modules))
    return FUNCTIONS.get(next(names, ""))


def _is_array(tree: Any) -> bool:
    return jax.tree.structure(tree) == jax.tree.structure(0)
