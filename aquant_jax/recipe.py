"""Recipes: every knob of post-training quantization in one frozen dataclass, with presets."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from collections.abc import Mapping
from typing import Any

from aquant_jax.arithmetic import border as borders
from aquant_jax.arithmetic.packing import FORMATS
from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS
from aquant_jax.errors import InputError
from aquant_jax.graph.activation_rules import RULES


@dataclasses.dataclass(frozen=True)
class Override:
    """Exception for the layers whose weight path a regex finds.

    Attributes:
      pattern: regex searched in the weight path and, if it has a colon, in the names of the
        activations that ``Recipe.activations`` adds (``encoder/query/kernel:matmul``); matching
        none is an error. Of several that match, the last one decides on each of those below.
      weight_bits: bits of the weights, or None to leave the recipe's.
      act_bits: bits of the tensor that feeds the layer, or None to leave the recipe's.
      keep_float: leave weights and input of the layer, or the activation, in float.
    """

    pattern: str
    weight_bits: int | None = None
    act_bits: int | None = None
    keep_float: bool = False


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is quantized. The defaults are those of the public QDrop code.

    Attributes:
      preset: name of the preset it started from.
      weight_bits, act_bits: 2 to 8.
      first_weight_bits, last_weight_bits: weights of the layers that read the network's input, and
        of those that no weighted layer follows; None for ``weight_bits``.
      last_act_bits: the input of the last layers; None for ``act_bits``.
      first_output_bits: bits of the first layers' output ("keep the first conv's output at 8
        bits"); None treats it as any other tensor.
      quantize_input: also quantize what depends on no weight, such as the input image.
      unit: "block" or "layer" (see `blocks.partition`).
      blocks: path regexes that replace the automatic merging of layers into blocks.
      activations: what is rounded to nearest besides the inputs of weighted ops: names of
        `sites.RULES`, such as "matmul" for the operands of a product of two activations.
      overrides: exceptions by path regex; the last match wins.
      steps: optimisation steps a unit; 0 rounds to nearest without any.
      batch_size: samples a step.
      border: name of the border function, or None to round activations to nearest.
      fused: average the border over the taps of a channel (Eq. 9), as the paper does.
      phi: see `border.PHIS`.
      border_format: of the deployed coefficients, see `packing.FORMATS`; what is rounded to it is
        what is scored and saved.
      input_mixing: probability that an element of a unit's input is the float network's.
      drop: probability that an element inside a unit stays unquantized (QDrop).
      settle: fraction of the steps, at the end, that neither mix nor drop: the borders and step
        sizes then see what is deployed.
      weight_lr, step_lr, border_lr: Adam learning rates of alpha, step sizes and coefficients.
      step_schedule, border_schedule: "constant" or "cosine" (to zero).
      border_gain: every coefficient's learning rate is multiplied by it: learning p with
        B = phi(1/2 + gain * p) is the same thing under Adam.
      border_range: likewise, as if u ran from 0 to this and not to Qmax: a step of Adam then moves
        the border by the same share of the tensor's range at every bit-width. None: u as it is.
      border_warmup: fraction of the steps before the coefficients start to move.
      rounding_weight: lambda of the rounding loss.
      rounding_warmup: fraction of the steps without rounding loss.
      beta_start, beta_end: the rounding loss's exponent.
      loss_power: the reconstruction loss is mean ``|error|^loss_power``, summed over channels.
      init_samples: samples for the initial step sizes.
    """

    preset: str = "custom"
    weight_bits: int = 4
    act_bits: int = 4
    first_weight_bits: int | None = 8
    last_weight_bits: int | None = 8
    last_act_bits: int | None = 8
    first_output_bits: int | None = None
    quantize_input: bool = False
    unit: str = "block"
    blocks: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    steps: int = 20_000
    batch_size: int = 32
    border: str | None = None
    fused: bool = True
    phi: str = "clamp"
    border_format: str = "float32"
    input_mixing: float = 0.0
    drop: float = 0.0
    settle: float = 0.0
    weight_lr: float = 1e-3
    step_lr: float = 4e-5
    border_lr: float = 1e-3
    step_schedule: str = "cosine"
    border_schedule: str = "constant"
    border_gain: float = 1.0
    border_range: float | None = 3.0
    border_warmup: float = 0.0
    rounding_weight: float = 0.01
    rounding_warmup: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    loss_power: float = 2.0
    init_samples: int = 256

    def __post_init__(self):
        # Lists come from config files and JSON; the recipe must stay hashable.
        for name in ("blocks", "activations", "overrides"):
            if not isinstance(getattr(self, name), list | tuple):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a list or tuple")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "activations", tuple(self.activations))
        items = (o if isinstance(o, Override) else _override(o) for o in self.overrides)
        object.__setattr__(self, "overrides", tuple(items))
        _check(self)

    def replace(self, **fields) -> Recipe:
        """A copy with other fields; InputError on an unknown one."""
        _known_fields(fields)
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, readable by ``preset(**dict)`` and JSON."""
        return dataclasses.asdict(self)


_QDROP = {"input_mixing": 0.5, "drop": 0.5}

# What each row of the paper's tables means; see ../shared/docs/reference_procedures.md.
PRESETS: dict[str, Mapping[str, Any]] = {
    "nearest": {"steps": 0},
    "adaround": {"unit": "layer"},
    "brecq": {},
    "qdrop": _QDROP,
    "aquant": {**_QDROP, "border": "quadratic", "fused": False, "phi": "identity", "settle": 0.5},
    "aquant_bert": {"unit": "layer", "border": "quadratic", "fused": False, "phi": "identity"},
}


def preset(name: str, **fields) -> Recipe:
    """The preset called `name` with some fields replaced.

    >>> preset("aquant", weight_bits=2, act_bits=2).border
    'quadratic'

    Raises:
      InputError: unknown preset or field, or a value out of range; it lists what exists.
    """
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    _known_fields(fields)
    recipe = Recipe(**{**PRESETS[name], **fields, "preset": name})
    if recipe.border is not None:  # a restored recipe may name one that nobody registered here
        borders.get(recipe.border)
    return recipe


def nearest(weight_bits: int = 4, act_bits: int = 4, **fields) -> Recipe:
    """Rounding to nearest, scales by MSE search, nothing learned."""
    return preset("nearest", weight_bits=weight_bits, act_bits=act_bits, **fields)


def adaround(weight_bits: int = 4, act_bits: int = 4, **fields) -> Recipe:
    """AdaRound (Nagel et al. 2020), layer by layer, with LSQ step sizes."""
    return preset("adaround", weight_bits=weight_bits, act_bits=act_bits, **fields)


def brecq(weight_bits: int = 4, act_bits: int = 4, **fields) -> Recipe:
    """BRECQ (Li et al. 2020): block reconstruction, with LSQ step sizes."""
    return preset("brecq", weight_bits=weight_bits, act_bits=act_bits, **fields)


def qdrop(weight_bits: int = 4, act_bits: int = 4, **fields) -> Recipe:
    """QDrop (Wei et al. 2022): block reconstruction with randomly dropped quantization."""
    return preset("qdrop", weight_bits=weight_bits, act_bits=act_bits, **fields)


def aquant(weight_bits: int = 4, act_bits: int = 4, **fields) -> Recipe:
    """AQuant (Li et al. 2022): QDrop with learned border functions of the activations."""
    return preset("aquant", weight_bits=weight_bits, act_bits=act_bits, **fields)


def aquant_bert(weight_bits: int = 4, act_bits: int = 4, **fields) -> Recipe:
    """AQuant as the paper has it for BERT: AdaRound, layer by layer, with a border an element."""
    return preset("aquant_bert", weight_bits=weight_bits, act_bits=act_bits, **fields)


def _override(fields) -> Override:
    known = [f.name for f in dataclasses.fields(Override)]
    if not isinstance(fields, Mapping):
        raise InputError(f"overrides: {fields!r} is no dict of {', '.join(known)}")
    try:
        return Override(**fields)
    except TypeError as error:
        raise InputError(f"overrides: {dict(fields)}: {error}; fields: {known}") from error


def _known_fields(fields):
    known = [f.name for f in dataclasses.fields(Recipe)]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise InputError(f"unknown recipe field {name!r}; {hint}fields: {', '.join(known)}")


_POSITIVE = (
    "batch_size", "init_samples", "weight_lr", "step_lr", "border_lr", "loss_power",
    "border_gain", "border_range", "beta_start", "beta_end",
)  # fmt: skip


def _check(recipe: Recipe):
    _check_bits(recipe)
    _check_types(recipe)
    for name in ("step_schedule", "border_schedule"):
        _one_of(recipe, name, ("constant", "cosine"))
    _one_of(recipe, "unit", ("block", "layer"))
    _one_of(recipe, "border_format", FORMATS)
    for name in ("input_mixing", "drop", "settle", "border_warmup", "rounding_warmup"):
        if not 0.0 <= getattr(recipe, name) < 1.0:
            raise InputError(f"{name} is {getattr(recipe, name)}; it must be in [0, 1)")
    for name in _POSITIVE:
        value = getattr(recipe, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"{name} is {value}; it must be positive and finite")
    for name in ("steps", "rounding_weight"):
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise InputError(f"{name} is {getattr(recipe, name)}; it must be 0 or more, and finite")
    _check_names(recipe)


def _check_names(recipe: Recipe):
    for rule in recipe.activations:
        if rule not in RULES:
            raise InputError(f"activations: unknown rule {rule!r}; there are {', '.join(RULES)}")
    borders.get_phi(recipe.phi)


def _check_bits(recipe: Recipe):
    bits = {f: getattr(recipe, f) for f in vars(recipe) if f.endswith("_bits")}
    for override in recipe.overrides:
        bits[f"overrides[{override.pattern!r}].weight_bits"] = override.weight_bits
        bits[f"overrides[{override.pattern!r}].act_bits"] = override.act_bits
    for name, value in bits.items():
        if value is None and name not in ("weight_bits", "act_bits"):
            continue
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or value not in range(MIN_BITS, MAX_BITS + 1):
            raise InputError(f"{name} is {value!r}; it must be a whole number of 2 to 8 bits")


def _check_types(recipe: Recipe):
    kinds = {"int": numbers.Integral, "float": numbers.Real, "bool": bool, "str": str}
    for field in dataclasses.fields(recipe):
        kind_name, _, optional = str(field.type).partition(" | ")
        value, kind = getattr(recipe, field.name), kinds.get(kind_name)
        if kind is None or (optional and value is None):
            continue
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{field.name} is {value!r}; it must be of type {field.type}")
        if value != value:
            raise InputError(f"{field.name} is {value}")
    for pattern in (*recipe.blocks, *(o.pattern for o in recipe.overrides)):
        if not isinstance(pattern, str):
            raise InputError(f"blocks and overrides: {pattern!r} is no regular expression")
    for override in recipe.overrides:
        if not isinstance(override.keep_float, bool):
            raise InputError(f"overrides: keep_float is {override.keep_float!r}, no yes or no")


def _one_of(recipe, name, known):
    if getattr(recipe, name) not in known:
        raise InputError(f"{name} is {getattr(recipe, name)!r}; known: {', '.join(known)}")
