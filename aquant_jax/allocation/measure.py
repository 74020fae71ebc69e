"""The network's output error with one layer, or two of a block, quantized; kept in a folder."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aquant_jax.allocation.choices import Choice
from aquant_jax.allocation.layer_choices import LayerChoices
from aquant_jax.errors import InputError, ReconstructionError, reason
from aquant_jax.layers.compiler import Compiler
from aquant_jax.layers.fake_quant import LayerSpec
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.chain import inexact
from aquant_jax.reconstruction.finetune_checks import check_logits
from aquant_jax.reconstruction.loss import network_loss
from aquant_jax.reconstruction.probe import Probe, Roundings, rounding_to
from aquant_jax.sensitivity import Rounded, float_outputs
from aquant_jax.storage.folder_lock import hold
from aquant_jax.storage.json_file import differences, holds_numbers, jsonable, read_json, write_json

FILE = "sensitivity.json"
PAIR_POINTS = 3  # choices at which the interaction of two layers is measured
MOST_JOINT = 500  # choices of all layers, above which weights and inputs are measured apart
SMALLEST = 1e-12  # error with which two layers are correlated

Runs = dict[str, list[int | None]]
SEPARATOR = " & "  # of the paths of two layers


class Measurements:
    """Errors by layers and choice, written to a folder as they come.

    Args:
      folder: where `FILE` stands; None keeps nothing.
      call: identifies what is measured.
      runs: bits of the reconstruction that weights, or inputs, of some bits come from; see
        `origins.named_runs`.

    Attributes:
      measured: how many errors were measured.
      runs: those of the folder, and of the others those of this call.

    Raises:
      InputError: the folder holds the measurements of another call, is damaged, or cannot be
        written.
    """

    def __init__(self, folder: Path | None, call: dict[str, Any], runs: Runs) -> None:
        self._path = folder and folder / FILE
        self._call, self.runs = jsonable(call), runs
        self._errors: dict[str, dict[str, float]] = {}
        self.measured = 0
        if self._path is None or not self._path.exists():
            return
        try:
            stored = read_json(self._path)
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {reason(error)}") from error
        fields: dict[str, Any] = stored if isinstance(stored, dict) else {}
        found, known = fields.get("errors"), fields.get("runs", {})
        if (
            not isinstance(found, dict)
            or not all(map(holds_numbers, found.values()))
            or not isinstance(known, dict)
            or not all(isinstance(run, list) and len(run) == 2 for run in known.values())
        ):
            raise InputError(f"{self._path} is damaged: it holds no errors of layers by choice")
        if changed := differences(fields.get("call"), self._call):
            raise InputError(
                f"{self._path} holds the measurements of another call, which differs in "
                f"{', '.join(changed)}; choose another folder"
            )
        self._errors, self.runs = found, runs | known

    def get(self, key: Sequence[str], label: str, measure: Callable[[], float]) -> float:
        """The error of the layers `key` at the choice of that label, measured if it is missing."""
        found = self._errors.setdefault(SEPARATOR.join(key), {})
        if label not in found:
            found[label] = measure()
            self.measured += 1
            self._write()
        return found[label]

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            write_json(self._path, {"call": self._call, "runs": self.runs, "errors": self._errors})
        except OSError as error:
            raise InputError(f"{self._path} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def open_measurements(
    folder: str | Path | None, call: Mapping[str, Any], runs: Runs
) -> Iterator[Measurements]:
    """The measurements in a folder, which this process holds; see `Measurements`."""
    if folder is None:
        yield Measurements(None, dict(call), runs)
        return
    path = Path(folder)
    with hold(path, lambda: None):
        yield Measurements(path, dict(call), runs)


class Meter:
    """Measures output errors.

    Args:
      net: the float network, prepared; its plan has every tensor that may be quantized.
      calibration: its samples.
      layers: of the network.
      origins: says which uniform choice the weights, and the input, of a choice come from.
      rounded: the network quantized with a uniform choice wherever its recipe fixes nothing, and
        the static parts of its layers, if these have borders.
      compiler: where compiled blocks are shared.
    """

    def __init__(
        self,
        net: Network,
        calibration: Any,
        layers: Sequence[LayerChoices],
        origins: Callable[[Choice], tuple[Choice, Choice]],
        rounded: Callable[[Choice], tuple[Rounded, Sequence[LayerSpec] | None]],
        compiler: Compiler,
    ) -> None:
        self._net = net
        self._layers = {layer.path: layer for layer in layers}
        self._origins, self._rounded = origins, functools.cache(rounded)
        self._probe = functools.cache(functools.partial(_probe, net, calibration, compiler))
        kind = net.recipe.reconstruction.finetune_loss
        self._loss = jax.jit(functools.partial(network_loss, kind), static_argnums=0)

    def error(
        self, chosen: Mapping[str, Choice], weights: bool = True, inputs: bool = True
    ) -> float:
        """The output error with the layers of `chosen` quantized, all with borders of one kind.

        Args:
          chosen: by weight path.
          weights, inputs: False leaves all of them in float.
        """
        first = next(iter(chosen.values()))
        specs = self._rounded(self._origins(first)[1])[1]
        probe, targets = self._probe(specs and tuple(specs))
        replaced, of_inputs, of_reads = {}, {}, {}
        for path, choice in chosen.items():
            layer = self._layers[path]
            by_weights, by_inputs = (self._rounded(origin)[0] for origin in self._origins(choice))
            if weights and choice.weight_bits is not None:
                replaced[path] = by_weights.weights[path]._replace(border={})
            if inputs and layer.tensor is not None and choice.act_bits is not None:
                border, quantizer = by_inputs.weights[path].border, by_inputs.quantizers
                rounding = rounding_to(quantizer[layer.tensor], choice.act_bits, border)
                of_inputs[path] = rounding
                if layer.owner:
                    of_reads[layer.tensor] = rounding._replace(border={})
        outputs = probe.outputs(replaced, Roundings(of_inputs, of_reads))
        program = probe.programs[-1]
        found = inexact(program, program.subgraph.outputs, outputs)
        axes = inexact(program, program.subgraph.outputs, program.position_axes)
        mask = None if self._net.valid_mask is None else jnp.asarray(self._net.valid_mask)
        error = float(self._loss(tuple(axes), found, targets, mask))
        if not math.isfinite(error):
            raise ReconstructionError(f"{SEPARATOR.join(chosen)} at {first}: error {error}")
        return max(error, 0.0)


def _probe(
    net: Network, calibration: Any, compiler: Compiler, specs: Sequence[LayerSpec] | None
) -> tuple[Probe, list[jax.Array]]:
    """A probe, and the outputs of the float network."""
    probe = Probe(net, calibration, compiler, specs)
    program = probe.programs[-1]
    targets = inexact(program, program.subgraph.outputs, float_outputs(probe))
    if net.recipe.reconstruction.finetune_loss == "kl":
        check_logits(targets)
    return probe, targets


def interaction(alone: Sequence[float], both: float) -> float:
    """The correlation of the errors of two layers: ``(e_12 - e_1 - e_2) / (2 sqrt(e_1 e_2))``."""
    size = 2.0 * math.sqrt(alone[0] * alone[1])
    return float(np.clip((both - sum(alone)) / size, -1.0, 1.0)) if size > SMALLEST else 0.0


def measure(
    measurements: Measurements,
    meter: Meter,
    layers: Sequence[LayerChoices],
    blocks: Iterable[Sequence[str]],
) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray]]:
    """The error of every choice of every layer, and what two layers of a block add to their sum.

    Of more than `MOST_JOINT` choices, the first is the sum of two errors, with the weights alone
    quantized and with the input alone, where a layer has at most half as many of these. The second
    is ``2 r sqrt(e_1 e_2)`` with the mean of `interaction` at a few choices that both have as r:
    all pairs of choices would take their square in measurements.

    Returns:
      `solve.Problem.errors` and `solve.Problem.pairs`.
    """

    def error(*paths: str, choice: Choice) -> float:
        def run() -> float:
            return meter.error(dict.fromkeys(paths, choice))

        return measurements.get(paths, str(choice), run)

    sparing = sum(len(layer.choices) for layer in layers) > MOST_JOINT
    errors = [_alone(measurements, meter, layer, sparing) for layer in layers]
    index_of = {layer.path: i for i, layer in enumerate(layers)}
    pairs = {}
    for block in blocks:
        free = [path for path in block if len(layers[index_of[path]].choices) > 1]
        for one, two in itertools.combinations(free, 2):
            i, j = sorted((index_of[one], index_of[two]))
            found = []
            for c, d, choice in _common(layers[i], layers[j], errors[i], errors[j]):
                both = error(layers[i].path, layers[j].path, choice=choice)
                found.append(interaction((errors[i][c], errors[j][d]), both))
            if found:
                pairs[i, j] = 2 * np.mean(found) * np.sqrt(np.outer(errors[i], errors[j]))
    return errors, pairs


def _alone(
    measurements: Measurements, meter: Meter, layer: LayerChoices, sparing: bool
) -> np.ndarray:
    """The error of every choice of a layer, see `measure`."""

    def error(choice: Choice, label: str, weights: bool = True, inputs: bool = True) -> float:
        def run() -> float:
            return meter.error({layer.path: choice}, weights, inputs)

        return measurements.get((layer.path,), label, run)

    parts = [_parts(choice) for choice in layer.choices]
    apart = sum(len(set(labels)) for labels in zip(*parts, strict=True))
    if not sparing or 2 * apart > len(parts):
        return np.array([error(choice, str(choice)) for choice in layer.choices])
    return np.array([
        error(choice, of_weights, inputs=False) + error(choice, of_inputs, weights=False)
        for choice, (of_weights, of_inputs) in zip(layer.choices, parts, strict=True)
    ])  # fmt: skip


def _parts(choice: Choice) -> tuple[str, str]:
    """Labels of a choice's weights with a float input, and of its input with float weights."""
    weights, inputs = choice.weight_bits or 16, choice.act_bits or 16
    labels = f"w{weights}a16", f"w16a{inputs}"
    weights, inputs = (" ".join([label, *filter(None, choice.kind)]) for label in labels)
    return weights, inputs


def _common(
    one: LayerChoices, two: LayerChoices, errors: np.ndarray, others: np.ndarray
) -> list[tuple[int, int, Choice]]:
    """A few choices that both layers have, evenly spaced by error, with their indices."""
    both = [
        (errors[i] + others[two.choices.index(choice)], i, two.choices.index(choice), choice)
        for i, choice in enumerate(one.choices) if choice in two.choices
    ]  # fmt: skip
    both.sort(key=lambda entry: entry[:3])
    count = min(PAIR_POINTS, len(both))
    picked = [both[(2 * k + 1) * len(both) // (2 * count)] for k in range(count)]
    return [entry[1:] for entry in picked]
