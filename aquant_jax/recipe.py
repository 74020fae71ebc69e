"""Recipes: how a network is quantized, and how the quantizers are learned, with presets.

>>> import aquant_jax as aq
>>> aq.recipes.preset("aquant", weight_bits=2, act_bits=2, steps=400).reconstruction.steps
400
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.packing import FORMATS
from aquant_jax.errors import InputError
from aquant_jax.graph.activation_rules import RULES
from aquant_jax.recipe_checks import (
    check_bits,
    check_choice,
    check_taps,
    check_types,
    check_weights_only,
    field_names,
    hint,
)
from aquant_jax.recipe_reconstruction import Reconstruction

GRANULARITIES = ("block", "layer")
TRANSFORMS = ("shift_scale", "hadamard")
REFERENCE = ("quadratic", "element")  # the border that "auto" compares the others with


@dataclasses.dataclass(frozen=True)
class Override:
    """Exception for the layers whose weight path a regex finds.

    >>> import aquant_jax as aq
    >>> recipe = aq.recipes.aquant(3, 3, overrides=[aq.Override("head", weight_bits=8)])
    >>> recipe.overrides[0].weight_bits
    8

    Attributes:
      pattern: regex searched in the weight path and, if it has a colon, in the names of the
        activations that ``Recipe.activations`` adds (``encoder/query/kernel:matmul``). A pattern
        without a match is an error. Of several that match, the last one that sets a field decides.
      weight_bits: bits of the weights, or None for the recipe's.
      act_bits: bits of the layer's input, or None for the recipe's.
      keep_float: leave weights and input of the layer, or the activation, in float.
      border: border function of the layer's input, "nearest" for none, or None for the recipe's.
      border_granularity: of that border, or None for the recipe's.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None
    keep_float: bool = False
    border: str | None = None
    border_granularity: str | None = None


def exactly(path: str) -> str:
    """The pattern of an override that finds this path alone."""
    return f"^{re.escape(path)}$"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is quantized: bits, borders, rules and exceptions, and `Reconstruction`.

    >>> import aquant_jax as aq
    >>> aq.recipes.aquant(2, 2).replace(act_bits=4, steps=400).act_bits  # of both classes
    4

    Attributes:
      preset: name of the preset it started from.
      weight_bits: 2 to 8.
      act_bits: 2 to 8; None quantizes weights only. An override may still set it for some layers.
      weight_group: number of inputs of a dense layer's output channel that share a scale and a zero
        point; it must divide their number. None has one grid for each channel, as convolutions
        always have.
      first_weight_bits, last_weight_bits: weights of the layers that read the network's input, and
        of those that no weighted layer follows; None for ``weight_bits``.
      last_act_bits: the input of the last layers; None for ``act_bits``.
      first_output_bits: bits of the first layers' output; None treats it as any other tensor.
      quantize_input: also quantize activations that depend on no weight, such as the input image.
      granularity: what is reconstructed at once, "block" or "layer".
      blocks: path regexes that replace the automatic merging of layers into blocks.
      activations: which ones to round to nearest besides the inputs of weighted ops: "matmul" (the
        operands of a product of activations), "sum", "norm", "softmax", "activation".
      transforms: kinds of channel transforms to choose from, by the error of what reads a tensor:
        "shift_scale", a shift and a scale a channel; "hadamard", a rotation of the channels.
      overrides: exceptions by path regex; the last match decides.
      require_all: a weighted op that stays float is an error, instead of a line of `describe`.
      border: name of the border function, or None to round activations to nearest. "auto" tries
        several for every block and keeps the cheapest that is good enough
        (``border_tolerance``); the quantized network's recipe has the choice in overrides.
      border_granularity: "element": one border a column element (input channel and tap); "mean":
        their average over the taps of a channel (Eq. 9), as the paper does; "channel": one border
        an input channel, so that an activation has one code and the convolution needs no columns.
      phi: from polynomial to border: "identity", "clamp", "clamp_ste" or "sigmoid".
      border_format: of the deployed coefficients: "float32", "float16" or "int8".
      reconstruction: how the quantizers are learned.
    """

    preset: str = "custom"
    weight_bits: int = 4
    act_bits: int | None = 4
    weight_group: int | None = None
    first_weight_bits: int | None = 8
    last_weight_bits: int | None = 8
    last_act_bits: int | None = 8
    first_output_bits: int | None = None
    quantize_input: bool = False
    granularity: str = "block"
    blocks: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    require_all: bool = False
    border: str | None = None
    border_granularity: str = "mean"
    phi: str = "clamp"
    border_format: str = "float32"
    reconstruction: Reconstruction = dataclasses.field(default_factory=Reconstruction)

    def __post_init__(self) -> None:
        # Lists and dicts come from config files and JSON; the recipe must stay hashable.
        for name in ("blocks", "activations", "transforms", "overrides"):
            if not isinstance(getattr(self, name), list | tuple):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a list or tuple")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "activations", tuple(self.activations))
        object.__setattr__(self, "transforms", tuple(self.transforms))
        items = (o if isinstance(o, Override) else _override(o) for o in self.overrides)
        object.__setattr__(self, "overrides", tuple(items))
        if not isinstance(self.reconstruction, Reconstruction):
            object.__setattr__(self, "reconstruction", _reconstruction(self.reconstruction))
        check_bits(self)
        check_weights_only(self)
        check_types(self)
        _check_recipe(self)

    def replace(self, **fields: Any) -> Recipe:
        """A copy with other fields of the recipe or of its reconstruction.

        Raises:
          InputError: an unknown field, or a value out of range.
        """
        own, learning = _split(fields)
        recipe = dataclasses.replace(self, **own)
        learned = dataclasses.replace(recipe.reconstruction, **learning)
        return dataclasses.replace(recipe, reconstruction=learned)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, readable by ``preset(**dict)`` and JSON."""
        return dataclasses.asdict(self)


_QDROP = {"input_mixing": 0.5, "quant_drop_prob": 0.5}
_ELEMENTWISE = {"border": "quadratic", "border_granularity": "element", "phi": "identity"}
_AQUANT = {**_QDROP, **_ELEMENTWISE, "final_full_quant_fraction": 0.5}

# One preset per row of the paper's tables; see docs/explanation/method.md.
PRESETS: dict[str, Mapping[str, Any]] = {
    "nearest": {"steps": 0},
    "adaround": {"granularity": "layer"},
    "brecq": {},
    "qdrop": _QDROP,
    "aquant": _AQUANT,
    "aquant_plus": {**_AQUANT, "finetune_steps": None},
    "aquant_bert": {"granularity": "layer", **_ELEMENTWISE},
}


def preset(name: str, **fields: Any) -> Recipe:
    """The preset called `name` with some fields replaced, those of the reconstruction too.

    Raises:
      InputError: unknown preset or field, or a value out of range; it lists what exists.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    recipe = Recipe(preset=name).replace(**PRESETS[name]).replace(**{**fields, "preset": name})
    # Here, because a restored recipe may name one that nobody registered.
    if recipe.border not in (None, borders.AUTO):
        borders.get(recipe.border)
    return recipe


def nearest(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """Rounding to nearest, scales by MSE search, nothing learned."""
    return preset("nearest", weight_bits=weight_bits, act_bits=act_bits, **fields)


def adaround(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """AdaRound (Nagel et al. 2020), layer by layer, with LSQ step sizes."""
    return preset("adaround", weight_bits=weight_bits, act_bits=act_bits, **fields)


def brecq(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """BRECQ (Li et al. 2020): block reconstruction, with LSQ step sizes."""
    return preset("brecq", weight_bits=weight_bits, act_bits=act_bits, **fields)


def qdrop(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """QDrop (Wei et al. 2022): block reconstruction with randomly dropped quantization."""
    return preset("qdrop", weight_bits=weight_bits, act_bits=act_bits, **fields)


def aquant(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """AQuant (Li et al. 2022): QDrop with learned border functions of the activations."""
    return preset("aquant", weight_bits=weight_bits, act_bits=act_bits, **fields)


def aquant_plus(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """AQuant, and then the whole-network stage, of as many steps as a block's."""
    return preset("aquant_plus", weight_bits=weight_bits, act_bits=act_bits, **fields)


def aquant_bert(weight_bits: int = 4, act_bits: int | None = 4, **fields: Any) -> Recipe:
    """AQuant as in the paper's BERT experiments: layer by layer, one border per element."""
    return preset("aquant_bert", weight_bits=weight_bits, act_bits=act_bits, **fields)


def _split(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of a recipe, and those of its reconstruction; InputError on an unknown one."""
    own, learning = field_names(Recipe), field_names(Reconstruction)
    for name in fields:
        if name not in own and name not in learning:
            raise InputError(f"unknown recipe field {name!r}; {hint(name, [*own, *learning])}")
    return (
        {name: value for name, value in fields.items() if name in own},
        {name: value for name, value in fields.items() if name in learning},
    )


def _override(fields: Any) -> Override:
    known = field_names(Override)
    if not isinstance(fields, Mapping):
        wanted = f"an aq.Override(pattern, ...), or a dict of {', '.join(known)}"
        raise InputError(f"overrides: {fields!r} must be {wanted}")
    try:
        return Override(**fields)
    except TypeError as error:
        raise InputError(f"overrides: {dict(fields)}: {error}; fields: {known}") from error


def _reconstruction(fields: Any) -> Reconstruction:
    if not isinstance(fields, Mapping):
        raise InputError(f"reconstruction is {fields!r}; it must be a dict of its fields")
    known = field_names(Reconstruction)
    for name in fields:
        if name not in known:
            raise InputError(f"unknown field 'reconstruction.{name}'; {hint(name, known)}")
    return Reconstruction(**fields)


def _check_recipe(recipe: Recipe) -> None:
    check_choice(recipe, "granularity", GRANULARITIES)
    check_choice(recipe, "border_format", FORMATS)
    check_choice(recipe, "border_granularity", borders.GRANULARITIES)
    check_taps(recipe.border, recipe.border_granularity)
    for rule in recipe.activations:
        if rule not in RULES:
            raise InputError(f"activations: unknown rule {rule!r}; there are {', '.join(RULES)}")
    for kind in recipe.transforms:
        if kind not in TRANSFORMS:
            raise InputError(f"transforms: unknown kind {kind!r}; known: {', '.join(TRANSFORMS)}")
    borders.get_phi(recipe.phi)
    for pattern in (*recipe.blocks, *(o.pattern for o in recipe.overrides)):
        if not isinstance(pattern, str):
            raise InputError(f"blocks and overrides: {pattern!r} is not a regular expression")
    for override in recipe.overrides:
        if not isinstance(override.keep_float, bool):
            raise InputError(f"overrides: keep_float is {override.keep_float!r}, not True or False")
        check_types(override)
        if override.border_granularity is not None:
            check_choice(override, "border_granularity", borders.GRANULARITIES)


def border_of(recipe: Recipe, overrides: Sequence[Override]) -> tuple[str | None, str]:
    """Name and granularity of the border of a layer that `overrides` match.

    Raises:
      InputError: an unknown border, or one that needs taps where there are none.
    """
    name, granularity = recipe.border, recipe.border_granularity
    if name == borders.AUTO:  # the most expensive that is tried, until one is chosen
        name, granularity = REFERENCE
    for override in overrides:
        granularity = override.border_granularity or granularity
        if override.border is not None:
            name = None if override.border == borders.NEAREST else override.border
    if name is not None:
        borders.get(name)
    check_taps(name, granularity)
    return name, granularity
