"""Checks of the fields of a recipe, against their annotations and ranges."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS
from aquant_jax.errors import InputError

# Earlier names of the fields, for hints.
RENAMED = {
    "unit": "granularity",
    "fused": "border_granularity",
    "shared_across_taps": "border_granularity",
    "drop": "reconstruction.quant_drop_prob",
    "settle": "reconstruction.final_full_quant_fraction",
}
_KINDS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str}


def field_names(cls: type) -> list[str]:
    """The fields of a dataclass."""
    return [field.name for field in dataclasses.fields(cls)]


def hint(name: str, known: Sequence[str]) -> str:
    """The new name of an unknown field, or a close one, or all.

    >>> hint("settle", [])
    "'settle' is now 'reconstruction.final_full_quant_fraction'"
    """
    if name in RENAMED:
        return f"{name!r} is now {RENAMED[name]!r}"
    close = difflib.get_close_matches(name, known, 1)
    return f"{f'did you mean {close[0]!r}? ' if close else ''}fields: {', '.join(known)}"


def check_types(part: Any) -> None:
    """Check the scalar fields of a dataclass against their annotations.

    An int passes as a float; a bool passes as neither. NumPy numbers become plain ones.

    Raises:
      InputError: a value of another type, or NaN.
    """
    for name, annotation in typing.get_type_hints(type(part)).items():
        union = isinstance(annotation, types.UnionType)
        accepted = typing.get_args(annotation) if union else (annotation,)
        kinds = tuple(_KINDS[kind] for kind in accepted if kind in _KINDS)
        value = getattr(part, name)
        if not kinds or (value is None and types.NoneType in accepted):
            continue
        if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
            wanted = " | ".join("None" if k is types.NoneType else k.__name__ for k in accepted)
            raise InputError(f"{name} is {value!r}; it must be of type {wanted}")
        if value != value:
            raise InputError(f"{name} is {value}")
        if isinstance(value, np.generic):
            object.__setattr__(part, name, value.item())


def check_bits(recipe: Any) -> None:
    """InputError unless the bits of a recipe and its overrides are 2 to 8, or None if optional."""
    names = [name for name in field_names(type(recipe)) if name.endswith("_bits")]
    bits = {name: getattr(recipe, name) for name in names}
    for override in recipe.overrides:
        bits[f"overrides[{override.pattern!r}].weight_bits"] = override.weight_bits
        bits[f"overrides[{override.pattern!r}].act_bits"] = override.act_bits
    for name, value in bits.items():
        if value is None and name != "weight_bits":
            continue
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or value not in range(MIN_BITS, MAX_BITS + 1):
            raise InputError(f"{name} is {value!r}; it must be a whole number of 2 to 8 bits")


def check_weights_only(recipe: Any) -> None:
    """InputError for a group of no weights, and for borders without activations to round."""
    check_types(recipe)
    if recipe.weight_group is not None and recipe.weight_group < 1:
        raise InputError(f"weight_group is {recipe.weight_group}; it must be at least 1")
    if recipe.act_bits is None and recipe.border is not None:
        raise InputError(
            f"act_bits is None, so border {recipe.border!r} has no activations to round; presets "
            "for weights only: nearest, adaround, brecq, qdrop"
        )


def check_choice(part: Any, name: str, known: Sequence[str]) -> None:
    """InputError unless the field has one of the values."""
    if getattr(part, name) not in known:
        raise InputError(f"{name} is {getattr(part, name)!r}; known: {', '.join(known)}")


def check_ranges(
    part: Any, names: Sequence[str], accepts: Callable[[float], bool], wanted: str
) -> None:
    """InputError unless `accepts` holds for each of the fields that is not None."""
    for name in names:
        value = getattr(part, name)
        if value is not None and not accepts(value):
            raise InputError(f"{name} is {value}; it must be {wanted}")


def check_taps(name: str | None, granularity: str) -> None:
    """Raises an InputError for a border that needs taps where a granularity has none."""
    border = borders.BORDERS.get(name or "")
    if border and border.needs_taps and granularity == "channel":
        raise InputError(
            f"border {name!r} depends on the tap; border_granularity 'channel' has no taps"
        )
