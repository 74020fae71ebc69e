"""Draws the figures of docs/explanation/method.md (the paper's Fig. 1 and Fig. 2), from our data,
and the Pareto front of docs/results.md.

    python docs/method_figures.py

Figure 1 takes a weight of the digits network at 2 bits and the border of Eq. 4, evaluated by the
library. Figure 2 takes the propagated errors of a run of launch.quantize on ResNet-20, whose
command is in measurements/propagated_error.json. The front is of measurements/resnet20_allocation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import aquant_jax as aq
from aquant_jax import data, models
from aquant_jax.arithmetic.border import borders

DOCS = Path(__file__).resolve().parent
LAYER = "block1/conv1/kernel"
ACTIVATION, WANTED = 2.0, 0.3  # x in units of its step size, and the border of the paper's figure
DRAWN_BLOCKS = ("params/layer1_1", "params/layer3_0")
CENTRE, MEAN, DEVIATION, COUNT = range(4)


class Element(NamedTuple):
    """One product of a dot product: a weight, its quantized value, and an activation."""

    weight: float
    quantized: float
    activation: float

    def error(self, rounding: Any) -> Any:
        """Eq. 3: the error of the product, for an activation that is moved by `rounding`."""
        change = self.quantized - self.weight
        return self.quantized * rounding + change * self.activation

    def border(self) -> float:
        """Eq. 4, as the linear border of the library."""
        slope = 1 - self.weight / self.quantized
        coefficients = {"b0": np.full((1, 1), 0.5, "f"), "b1": np.full((1, 1), slope, "f")}
        u = np.full((1, 1), self.activation, np.float32)
        return float(borders("linear", "identity", False, coefficients, [u])[0][0, 0])


def element() -> Element:
    """The weight of a layer of the digits network, at 2 bits, whose border is closest to WANTED."""
    apply, variables = models.create("digits_cnn", models.DIGITS_WEIGHTS)
    samples = data.load("digits").calibration(256).inputs
    recipe = aq.recipes.nearest(2, 2)
    network = aq.quantize(apply, variables, samples, recipe, observer=aq.Observer())
    layer = next(layer for layer in network.summary() if layer.path == LAYER)
    folded = aq.prepare(apply, variables, samples, recipe).folded[LAYER].weight
    weights = np.asarray(folded) / layer.weight_scale
    codes = layer.codes.astype(np.float32) - layer.weight_zero_point
    pairs = zip(weights.ravel(), codes.ravel(), strict=True)
    found = [Element(float(w), float(q), ACTIVATION) for w, q in pairs if q > 0]
    return min(found, key=lambda one: abs(one.border() - WANTED))


def element_error(figure: Figure, one: Element) -> None:
    """Figure 1: the squared error over the rounding, and the error with its means."""
    squares, errors = figure.subplots(1, 2)
    border, rounding = one.border(), np.linspace(-1, 1, 201)
    squares.plot(rounding, one.error(rounding) ** 2, color="black")
    for value, color, style in ((0.5, "tab:gray", "--"), (border, "tab:green", ":")):
        ends = np.array([-value, 1 - value])
        name = "nearest, B = 0.5" if value == 0.5 else f"border, B = {value:.2f}"
        squares.plot(ends, one.error(ends) ** 2, "o", color=color, label=name)
        squares.vlines(ends, 0, one.error(ends) ** 2, colors=color, linestyles=style)
        inside = np.linspace(*ends, 101)
        mean = one.error(inside).mean()
        label = f"{name}: mean {mean:.2f}"
        alpha = 0.3 if value == 0.5 else 0.5
        errors.fill_between(inside, one.error(inside), color=color, alpha=alpha, label=label)
    errors.plot(rounding, one.error(rounding), color="black")
    errors.axhline(0, color="black", lw=0.5)
    for axes, label in ((squares, "squared error"), (errors, "error")):
        axes.set_xlabel("Δx (rounded x minus x)")
        axes.set_ylabel(f"{label} of the product")
        axes.legend(fontsize=8)
    text = f"w = {one.weight:.2f}, quantized {one.quantized:.0f}, x = {one.activation:.0f}"
    figure.suptitle(f"{text} (in step sizes)", fontsize=9)


def propagated_error(figure: Figure, run: Any) -> None:
    """Figure 2: the mean error of a block's input, in clusters of its magnitude."""
    blocks = [block for block in run["blocks"] if block["name"] in DRAWN_BLOCKS]
    for axes, block in zip(figure.subplots(1, len(blocks)), blocks, strict=True):
        rows = np.array(block["propagated"], np.float64)
        rows = rows[rows[:, COUNT] > 0]
        axes.plot(rows[:, CENTRE], rows[:, MEAN], "o-", ms=4)
        axes.axhline(0, color="black", lw=0.5)
        axes.set_title(f"input of {block['name'].removeprefix('params/')}", fontsize=9)
        axes.set_xlabel("magnitude |x'|")
        axes.set_ylabel("mean of x' - x")


def allocation_front(figure: Figure, measured: Any) -> None:
    """The learned allocations of a front beside their prediction, and the uniform recipes."""
    divergence, score = figure.subplots(1, 2)
    points = measured["front_learned"]["points"]
    size = [point["costs"]["bytes"] / 1000 for point in points]
    divergence.plot(size, [point["predicted"] for point in points], "o--", mfc="none",
                    label="predicted")  # fmt: skip
    divergence.plot(size, [point["held_kl_2000"] for point in points], "o", label="measured")
    divergence.set_yscale("log")
    divergence.set_ylabel("KL divergence from float")
    score.plot(size, [point["top1"] for point in points], "o-", color="C1", label="allocated")
    for bits in ("uniform W2A2", "uniform W3A3"):
        runs = [run for run in measured["runs"] if run["bits"] == bits]
        kl = next(run["held_kl_2000"] for run in measured["learned"] if run["bits"] == bits)
        style = {"marker": "s", "color": "black", "ls": "none", "ms": 5}
        label = "uniform, measured" if bits == "uniform W2A2" else None
        divergence.plot([runs[0]["packed_bytes"] / 1000], [kl], label=label, **style)
        tops = [run["quantized"]["top1"] for run in runs]
        score.plot([run["packed_bytes"] / 1000 for run in runs], tops, label=label, **style)
        score.annotate(bits.split()[1], (runs[0]["packed_bytes"] / 1000, min(tops)), (6, -4),
                       textcoords="offset points", fontsize=8)  # fmt: skip
    score.set_ylabel("top-1 %")
    for axes in (divergence, score):
        axes.set_xlabel("kilobytes, with borders")
        axes.legend(fontsize=8)


def write(name: str, draw: Any, *arguments: Any) -> None:
    """Writes one figure, with the same bytes for the same data."""
    style = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure = Figure((8, 3.2), layout="constrained")
        draw(figure, *arguments)
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(DOCS / "images" / f"{name}.svg", metadata=metadata)


FROM_MEASUREMENTS = (
    ("propagated_error", propagated_error, "propagated_error.json"),
    ("allocation_front", allocation_front, "resnet20_allocation.json"),
)


def main() -> None:
    """Draws all."""
    write("element_error", element_error, element())
    for name, draw, source in FROM_MEASUREMENTS:
        write(name, draw, json.loads((DOCS / "measurements" / source).read_text()))


if __name__ == "__main__":
    main()
