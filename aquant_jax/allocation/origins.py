"""Which uniform quantizations of a network the parts of a choice come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from aquant_jax.allocation.choices import Choice
from aquant_jax.allocation.layer_choices import uniform
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerSpec, Weights, dequantize_weight
from aquant_jax.plan.assign import make_plan
from aquant_jax.plan.network import Network
from aquant_jax.sensitivity import Rounded, nearest

Kind = tuple[str | None, str | None]
Specs = Sequence[LayerSpec] | None


class Origins(NamedTuple):
    """Uniform choices by the bits that they have, for one kind of border.

    Attributes:
      weights: by weight bits.
      inputs: by activation bits.
    """

    weights: dict[int | None, Choice]
    inputs: dict[int | None, Choice]


def uniform_choices(choices: Sequence[Choice], borders: bool) -> dict[Kind, Origins]:
    """As few uniform choices as have all bits of weights and activations, by kind of border.

    Args:
      choices: that layers may have.
      borders: whether the networks have borders; all are of one kind otherwise.
    """
    kinds: dict[Kind, list[Choice]] = {}
    for choice in choices:
        kinds.setdefault(choice.kind if borders else (None, None), []).append(choice)
    found = {}
    for kind, own in kinds.items():
        weights = sorted({c.weight_bits for c in own if c.weight_bits is not None}) or [None]
        inputs = sorted({c.act_bits for c in own if c.act_bits is not None}) or [None]
        origins = Origins({}, {})
        for i in range(max(len(weights), len(inputs))):
            w, a = weights[min(i, len(weights) - 1)], inputs[min(i, len(inputs) - 1)]
            pair = Choice(w, a, *(kind if a else (None, None)))
            origins.weights.setdefault(w, pair)
            origins.inputs.setdefault(a, pair)
        found[kind] = origins
    return found


def named_runs(table: Mapping[Kind, Origins]) -> dict[str, list[int | None]]:
    """The bits of the uniform choices of a table, by the bits and border that they stand for."""
    return {
        _name(letter, bits, kind): [run.weight_bits, run.act_bits]
        for kind, origins in table.items()
        for letter, runs in zip("wa", origins, strict=True) for bits, run in runs.items()
    }  # fmt: skip


def from_runs(
    table: Mapping[Kind, Origins], known: Mapping[str, Sequence[int | None]]
) -> dict[Kind, Origins]:
    """A table with the runs that `named_runs` named in place of its own."""

    def pick(letter: str, kind: Kind, runs: Mapping[int | None, Choice]) -> dict[Any, Choice]:
        found = {bits: known[_name(letter, bits, kind)] for bits in runs}
        return {b: Choice(w, a, *(kind if a else (None, None))) for b, (w, a) in found.items()}

    return {
        kind: Origins(pick("w", kind, origins.weights), pick("a", kind, origins.inputs))
        for kind, origins in table.items()
    }


def _name(letter: str, bits: int | None, kind: Kind) -> str:
    return " ".join([f"{letter}{bits or 16}", *filter(None, kind)])


def origins_of(table: Mapping[Kind, Origins], choice: Choice) -> tuple[Choice, Choice]:
    """The uniform choices that the weights, and the input, of a layer at `choice` come from.

    Bits that no choice has are fixed, and the same in all of them.
    """
    first = next(iter(table.values()))
    own = table.get(choice.kind, first)
    weights = own.weights.get(choice.weight_bits) or next(iter(own.weights.values()))
    inputs = own.inputs.get(choice.act_bits) or next(iter(own.inputs.values()))
    return weights, inputs


def round_nearest(
    net: Network, samples: Any, compiler: Compiler, choice: Choice
) -> tuple[Rounded, Specs]:
    """The network rounded to nearest with one choice, without borders."""
    plan = make_plan(net.graph, uniform(net.recipe, choice))
    layers = {path: spec._replace(border=None) for path, spec in plan.layers.items()}
    net = net._replace(plan=plan._replace(layers=layers))
    return nearest(net, samples, compiler), None


def round_learned(
    net: Network, run: Callable[[Choice], Quantized], borders: bool, choice: Choice
) -> tuple[Rounded, Specs]:
    """The layers of a network that `run` has reconstructed, with their borders if asked for."""
    quantized = run(choice)
    layers, activations, _ = quantized.on_host().states
    ops = {op.layer.path: op for op in net.graph.ops if op.layer is not None}
    weights = {
        path: Weights(dequantize_weight(ops[path], layer), layer.bias, dict(layer.border))
        for path, layer in layers.items()
    }
    return Rounded(weights, dict(activations)), quantized.specs if borders else None
