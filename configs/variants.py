"""Reads the variant of a config: ``w2a2,preset=aquant``."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.recipe import TRANSFORMS as KINDS

# The default of the configs first.
PRESETS = ("aquant", "nearest", "adaround", "brecq", "qdrop", "aquant_plus")
BERT_PRESETS = ("aquant_bert", "nearest", "adaround", "aquant_plus")
TRANSFORMS = {"none": ()} | {kind: (kind,) for kind in KINDS}  # of channels
_BITS = ((4, 4), (2, 4), (3, 3), (2, 2), (4, 2), (4, 6), (4, 8), (8, 8))
BIT_WIDTHS: dict[str, tuple[int, int | None]] = {f"w{w}a{a}": (w, a) for w, a in _BITS}
BIT_WIDTHS |= {f"w{w}a16": (w, None) for w in (2, 3, 4, 8)}  # weights only


class Variant(NamedTuple):
    """Bits of weights and activations, and the settings given as key=value."""

    weight_bits: int
    act_bits: int | None
    settings: dict[str, str]


def parse(argument: str, default: str = "w2a2", **choices: tuple[str, ...]) -> Variant:
    """Parses a variant.

    Args:
        argument: comma-separated: at most one bit-width and key=value pairs; a value may stand
            alone where only one key has it.
        default: the bit-width if there is none.
        **choices: the keys that this config knows, the default first among its values.

    Returns:
        Every key of ``choices`` has a setting.

    Raises:
        InputError: an unknown bit-width, key or value, listing what exists, or one twice.

    >>> parse("w4a4,preset=qdrop", preset=("aquant", "qdrop"))
    Variant(weight_bits=4, act_bits=4, settings={'preset': 'qdrop'})
    """
    settings: dict[str, str] = {}
    for part in filter(None, argument.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = next((k for k, v in choices.items() if part in v), "bits"), part
        known = {"bits": tuple(BIT_WIDTHS), **choices}
        if key not in known:
            raise InputError(f"unknown key {key!r} in {argument!r}; there are {', '.join(choices)}")
        if value not in known[key]:
            what = "variant" if key == "bits" else key
            raise InputError(f"unknown {what} {value!r}; there are {', '.join(known[key])}")
        if key in settings:
            raise InputError(f"{key} is given twice: {settings[key]} and {value}")
        settings[key] = value
    bits = BIT_WIDTHS[settings.pop("bits", default)]
    return Variant(*bits, {key: values[0] for key, values in choices.items()} | settings)


def recipe(variant: Variant, **fields: Any) -> ConfigDict:
    """All fields of the variant's recipe but its name, for flags to override any of them."""
    name = variant.settings["preset"]
    bits = {"weight_bits": variant.weight_bits, "act_bits": variant.act_bits}
    preset = aq.recipes.preset(name, **bits)
    if preset.reconstruction.steps == 0:  # nearest, which is that preset only without any
        fields = {field: value for field, value in fields.items() if field != "steps"}
    fields = preset.replace(**fields).to_dict()
    del fields["preset"]
    return ConfigDict(fields)
