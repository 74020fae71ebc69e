"""What each layer of a network may choose: the choices less what the recipe fixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from aquant_jax.allocation.choices import Choice
from aquant_jax.arithmetic.border import AUTO, NEAREST
from aquant_jax.errors import InputError
from aquant_jax.graph.ir import Graph
from aquant_jax.layers.fake_quant import LayerSpec
from aquant_jax.plan.assign import Plan, make_plan
from aquant_jax.recipe import Override, Recipe, exactly

PROBES = (2, 3)  # bits that a layer must follow, or they are fixed


class LayerChoices(NamedTuple):
    """One layer, and what it may choose.

    Attributes:
      path: of its weight.
      tensor: key of the tensor that it reads, or None where its input stays float.
      choices: at least one; the bits that the recipe fixes are in all of them.
      weights_fixed, input_fixed: whether the recipe fixes their bits.
      by_override: whether the overrides of the recipe fix any.
      weights_exempt, input_exempt: whether the recipe fixes them as the first or last layer's.
      border: name and granularity of the recipe's border of its input; the name may be None.
    """

    path: str
    tensor: str | None
    choices: tuple[Choice, ...]
    weights_fixed: bool
    input_fixed: bool
    by_override: bool
    weights_exempt: bool
    input_exempt: bool
    border: tuple[str | None, str]

    @property
    def owner(self) -> bool:
        """Whether it is the first of the layers that read its tensor."""
        return self.tensor == self.path


def uniform(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with one choice wherever it fixes nothing."""
    fields: dict[str, object] = {"act_bits": choice.act_bits}
    if choice.weight_bits is not None:
        fields["weight_bits"] = choice.weight_bits
    if choice.act_bits is None or choice.border == NEAREST:
        fields["border"] = None
    elif choice.border is not None:
        fields["border"] = choice.border
    if choice.border_granularity is not None:
        fields["border_granularity"] = choice.border_granularity
    return recipe.replace(**fields)


def layer_choices(
    graph: Graph, recipe: Recipe, choices: Sequence[Choice]
) -> tuple[LayerChoices, ...]:
    """The choices of every layer, in the order of the graph.

    Raises:
      InputError: what the recipe fixes for a layer fits none of the choices.
    """
    acts = any(choice.act_bits for choice in choices)
    plans = _plans(graph, recipe, acts)
    bare = _plans(graph, dataclasses.replace(recipe, overrides=()), acts)
    found = []
    for path, spec in plans[0].layers.items():
        weights, inputs = _fixed(plans, path)
        exempt = _fixed(bare, path)
        own = _own(choices, spec, weights, inputs)
        if not own:
            raise InputError(
                f"{path}: the recipe fixes its input at {spec.act_bits} bits, which none of the "
                f"choices has: {', '.join(map(str, choices))}"
            )
        by_override = (weights and not exempt[0]) or (inputs and not exempt[1])
        border = spec.border, spec.border_granularity
        found.append(
            LayerChoices(path, spec.tensor, own, weights, inputs, by_override, *exempt, border)
        )
    return tuple(found)


def _plans(graph: Graph, recipe: Recipe, acts: bool) -> tuple[Plan, Plan]:
    """The plans of two uniform recipes, which differ where the recipe fixes nothing."""
    low, high = (
        make_plan(graph, uniform(recipe, Choice(bits, bits if acts else None))) for bits in PROBES
    )
    return low, high


def _fixed(plans: tuple[Plan, Plan], path: str) -> tuple[bool, bool]:
    """Whether the weights and the input of a layer have the same bits in both plans."""
    low, high = (plan.layers[path] for plan in plans)
    same_input = low.tensor is None or low.act_bits == high.act_bits
    return low.weight_bits == high.weight_bits, same_input


def _own(
    choices: Sequence[Choice], spec: LayerSpec, weights_fixed: bool, input_fixed: bool
) -> tuple[Choice, ...]:
    own = []
    for choice in choices:
        weights = spec.weight_bits if weights_fixed else choice.weight_bits
        act = spec.act_bits if input_fixed and spec.tensor else choice.act_bits
        act = None if spec.tensor is None else act
        if weights is None and act is not None and not weights_fixed:
            continue  # a float layer cannot keep the bits that its input has
        kind = choice.kind if act is not None and choice.act_bits is not None else (None, None)
        own.append(Choice(weights, act, *kind))
    return tuple(dict.fromkeys(own))


def base_recipe(
    recipe: Recipe, choices: Sequence[Choice], layers: Sequence[LayerChoices]
) -> Recipe:
    """The recipe that the overrides of an allocation extend.

    Only a recipe without bits for activations has quantized layers with a float input: where no
    choice has such bits, or a layer may choose a float input, overrides give them to the others.

    Raises:
      InputError: there is such a layer, and the recipe tries several borders.
    """
    weights_only = not any(choice.act_bits for choice in choices) or any(
        layer.tensor and not layer.input_fixed and choice.weight_bits and not choice.act_bits
        for layer in layers for choice in layer.choices
    )  # fmt: skip
    if recipe.act_bits is not None and not weights_only:
        return recipe
    if recipe.border == AUTO:
        raise InputError(f"border {AUTO!r} and choices with act_bits None exclude each other")
    return dataclasses.replace(recipe, act_bits=None, border=None)


class Recipes(NamedTuple):
    """What the overrides of an allocation depend on besides the choices.

    Attributes:
      given: the user's recipe.
      base: see `base_recipe`.
      rules: keys of the quantized activations that no layer reads.
      ruled: by the tensor that layers read, the key of the rule that matches it.
    """

    given: Recipe
    base: Recipe
    rules: tuple[str, ...]
    ruled: dict[str, str]


def chosen_overrides(
    recipes: Recipes, layers: Sequence[LayerChoices], chosen: Sequence[Choice]
) -> dict[str, Override]:
    """The overrides of an allocation that extend `base_recipe`, by layer or activation.

    Args:
      recipes: of the allocation.
      layers: of the network.
      chosen: by each of them.
    """
    explicit = recipes.base.act_bits is None
    overrides = {}
    for layer, choice in zip(layers, chosen, strict=True):
        override = _override(layer, choice, explicit)
        if override != Override(override.pattern):
            overrides[layer.path] = override
        key = recipes.ruled.get(layer.tensor or "")
        if key and choice.act_bits is None:  # which the rule would round
            overrides[key] = Override(exactly(key), keep_float=True)
    if explicit and recipes.given.act_bits is not None:
        for key in recipes.rules:
            overrides[key] = Override(exactly(key), act_bits=recipes.given.act_bits)
    return overrides


def _override(layer: LayerChoices, choice: Choice, explicit: bool) -> Override:
    """What a layer chose beyond what is fixed; all that concerns its input if `explicit`."""
    pattern = exactly(layer.path)
    if choice.weight_bits is None and not layer.weights_fixed:
        return Override(pattern, keep_float=True)
    weight_bits = None if layer.weights_fixed else choice.weight_bits
    if not explicit or choice.act_bits is None:
        act_bits = None if layer.input_fixed else choice.act_bits
        return Override(pattern, weight_bits, act_bits, False, *choice.kind)
    border, granularity = layer.border
    border = choice.border or border
    granularity = (choice.border_granularity or granularity) if border else None
    return Override(pattern, weight_bits, choice.act_bits, False, border, granularity)
