"""The result of an allocation: a recipe, the front of what else there was, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aquant_jax import recipe as recipes
from aquant_jax.allocation.choices import Budget, Choice, is_amount
from aquant_jax.errors import InputError, check_type, reason, to_path
from aquant_jax.recipe import Override, Recipe, exactly
from aquant_jax.storage.json_file import read_json, write_json
from aquant_jax.storage.parsing import malformed
from aquant_jax.terminal import table


class Entry(NamedTuple):
    """One choice of one layer.

    Attributes:
      path: of the layer's weight.
      choice: in words, such as "w3a4"; "w3a16" leaves the input in float, whatever its dtype.
      error: predicted output error of the network with this layer quantized alone: the measured
        one, and of it what the blocks behind leave, where whole blocks learn.
      costs: by name: "bytes", "weight_bits" and "act_bits" (its share of the averages),
        "bit_operations", "coefficients" and, where it was asked for, "latency".
      chosen: whether the allocation has it.
    """

    path: str
    choice: str
    error: float
    costs: Mapping[str, float]
    chosen: bool


class FrontPoint(NamedTuple):
    """One allocation of the Pareto front.

    Attributes:
      degradation: predicted output error.
      costs: of the whole network, by name.
      layers: what each layer that is not fixed departs from the recipe in.
    """

    degradation: float
    costs: Mapping[str, float]
    layers: Mapping[str, Override]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Bits and borders of every layer, under a budget.

    An allocation without layers is its recipe:

    >>> import aquant_jax as aq
    >>> empty = aq.Allocation(aq.recipes.aquant(3, 3), {}, aq.Budget(average_bits=3), 0.0, {})
    >>> empty.recipe.weight_bits
    3

    Attributes:
      base: the recipe that `layers` extend.
      layers: by weight path, the override of each layer that the recipe does not fix.
      budget: that it keeps to.
      degradation: predicted output error: KL divergence in nats, or relative mean squared error, as
        ``finetune_loss`` of the recipe says.
      costs: of the whole network, by name.
      front: allocations of least degradation, from the least to the most of the budget's cost.
      table: the error and the costs of every choice of every layer.
      measured: how many errors this call measured; the others came from its folder.
    """

    base: Recipe
    layers: Mapping[str, Override]
    budget: Budget
    degradation: float
    costs: Mapping[str, float]
    front: tuple[FrontPoint, ...] = ()
    table: tuple[Entry, ...] = ()
    measured: int = 0

    @property
    def recipe(self) -> Recipe:
        """The recipe of the allocation, for `quantize`."""
        return self.recipe_of(self)

    def recipe_of(self, point: FrontPoint | Allocation) -> Recipe:
        """The recipe of a point of the front."""
        check_type("point", point, (FrontPoint, Allocation), "one of allocation.front")
        overrides = (*self.base.overrides, *point.layers.values())
        return dataclasses.replace(self.base, overrides=overrides)

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, in which ``layers`` may be edited by hand.

        Raises:
          InputError: the file cannot be written.
        """
        content = {
            "budget": _set_fields(self.budget),
            "degradation": self.degradation,
            "costs": dict(self.costs),
            "layers": _layers(self.layers),
            "recipe": self.base.to_dict(),
            "front": [{**point._asdict(), "layers": _layers(point.layers)} for point in self.front],
            "table": [entry._asdict() for entry in self.table],
        }
        path = to_path("path", path)
        try:
            write_json(path, content)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {reason(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """The allocation in a file of `save`.

        Raises:
          InputError: the file is absent, or damaged, or holds bits that a recipe does not accept.
        """
        path = to_path("path", path)
        try:
            content = read_json(path)
        except OSError as error:
            raise InputError(f"{path}: {reason(error)}") from error
        with malformed(path):
            base = dict(content["recipe"])
            learning = base.pop("reconstruction")
            found = cls(
                recipes.Recipe(**base).replace(**learning),
                _overrides(content["layers"]),
                Budget(**content["budget"]),
                _number(content["degradation"]),
                _numbers(content["costs"]),
                tuple(
                    FrontPoint(
                        _number(point["degradation"]),
                        _numbers(point["costs"]),
                        _overrides(point["layers"]),
                    )
                    for point in content["front"]
                ),
                tuple(Entry(**entry) for entry in content["table"]),
            )
            _ = found.recipe, str(found)  # bits out of range, or a table of other things
        return found

    def __str__(self) -> str:
        lines = [f"{'layer':40s} {'choice':24s} {'error alone':>12s} {'bytes':>10s}"]
        lines += [
            f"{path:40s} {choice:24s} {error:>12s} {size:>10s}".rstrip()
            for path, choice, error, size in self._rows()
        ]
        return "\n".join([*lines, self._total()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        columns = {"layer": "left", "choice": "left", "error alone": "right", "bytes": "right"}
        title = f"{self.budget.name} {getattr(self.budget, self.budget.name)}"
        return Group(table(title, columns, self._rows()), Text(self._total()))

    def _rows(self) -> list[list[str]]:
        """Path, choice, error alone and bytes of every layer, as far as they are known."""
        rows = []
        for entry, choice, same in chosen_entries(self):
            known = [f"{same.error:.3g}", f"{same.costs['bytes']:,.0f}"] if same else ["", ""]
            rows.append([entry.path, choice, *known])
        return rows

    def _total(self) -> str:
        """The predicted degradation and the costs."""
        edited, floats, costs = "", "", costs_now(self)
        before = "before the edits: " if costs is None else ""
        for entry, choice, same in chosen_entries(self):
            if same and _counts_float(choice, same.costs):
                floats = " (a16 and float count with the bits of their dtype)"
            if same is not entry and not before:
                edited = " before the edits"
        costs = self.costs if costs is None else costs
        listed = ", ".join(f"{name} {value:,.6g}" for name, value in costs.items()) + floats
        return f"{before}predicted degradation {self.degradation:.4g}{edited}; {listed}"


def chosen_entries(allocation: Allocation) -> list[tuple[Entry, str, Entry | None]]:
    """By layer the entry that was chosen, the choice as it is now, and its entry, if it has one."""
    alone: dict[str, dict[str, Entry]] = {}
    for entry in allocation.table:
        alone.setdefault(entry.path, {})[entry.choice] = entry
    found = []
    for entry in allocation.table:
        if entry.chosen:
            known = alone[entry.path]
            choice = _choice(known, allocation.layers.get(entry.path), allocation.base)
            found.append((entry, choice, known.get(choice)))
    return found


def costs_now(allocation: Allocation) -> dict[str, float] | None:
    """The costs after the edits by hand; None where an edit is no choice of its table."""
    costs = dict(allocation.costs)
    for entry, _, same in chosen_entries(allocation):
        if same is None:
            return None
        if same is not entry:
            costs = {k: v + same.costs[k] - entry.costs[k] for k, v in costs.items()}
    return costs


def _counts_float(choice: str, costs: Mapping[str, float]) -> bool:
    """Whether averages count a float that a choice leaves, see `choices.Budget`."""
    weights = choice == str(Choice())
    inputs = weights or choice.endswith("a16")
    return (weights and costs["weight_bits"] > 0) or (inputs and costs["act_bits"] > 0)


def _choice(entries: Mapping[str, Entry], override: Override | None, base: Recipe) -> str:
    """The choice of a layer in words, as its override has it now.

    Args:
      entries: of the layer, by choice; bits that all of them have are fixed.
      override: of the layer; None leaves it to the recipe.
      base: the recipe.
    """
    if override is None and len(entries) == 1:
        return next(iter(entries))
    override = override or Override("")
    if override.keep_float:
        return str(Choice())
    bits = [c.split()[0].removeprefix("w").split("a") for c in entries if c != str(Choice())]
    weights, acts = ({pair[side] for pair in bits} for side in (0, 1))
    whole = len(bits) == len(entries)
    own = weights.pop() if whole and len(weights) == 1 else base.weight_bits
    of_input = acts.pop() if whole and len(acts) == 1 else base.act_bits or 16
    label = f"w{override.weight_bits or own}a{override.act_bits or of_input}"
    kind = [part for part in (override.border, override.border_granularity) if part]
    with_border = " ".join([label, *kind])
    # Where the recipe rounds no activation, the override names its border.
    return label if base.act_bits is None and with_border not in entries else with_border


def _set_fields(part: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    return {
        field.name: getattr(part, field.name)
        for field in dataclasses.fields(part) if getattr(part, field.name) != field.default
    }  # fmt: skip


def _layers(layers: Mapping[str, Override]) -> dict[str, dict[str, Any]]:
    return {
        path: {k: v for k, v in _set_fields(override).items() if k != "pattern"}
        for path, override in layers.items()
    }


def _overrides(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Override]:
    return {path: Override(exactly(path), **fields) for path, fields in layers.items()}


def _numbers(costs: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(value) for name, value in costs.items()}


def _number(value: Any) -> float:
    if not is_amount(value):
        raise InputError(f"{value!r} must be a number of 0 or more")
    return float(value)
