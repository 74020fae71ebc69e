"""Plots of one run and of a comparison, as PNG files. Needs matplotlib.

Everything drawn is plain data: block reports and layer summaries come in as mappings, fresh
from a run or read back from its results.json.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aquant_jax.errors import InputError, install_command
from aquant_jax.reporting.layers import border_curves
from aquant_jax.reporting.run import Report, metric_name, split_reports
from launch.lib.allocations import cost_of

Drawing = tuple[str, Callable[[Any], None]]  # title, draw(axes)

GRID_COLUMNS = 4
CENTRE, MEAN, DEVIATION, COUNT = range(4)


def require_matplotlib() -> Any:
    """Returns ``matplotlib.pyplot`` drawing to files; InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"plots need matplotlib: {install_command('report')}") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def run_plots(recipe: Any, reports: Sequence[Report], layers: Sequence[Any], folder: Path) -> None:
    """Writes loss, block_error, propagated_error and, where borders were learned, borders .png.

    Args:
        recipe: of the run; its preset is the name in the legends.
        reports: the fields of the report of every block, and of the whole-network stage.
        layers: the ``LayerSummary`` of every layer.
        folder: where to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    trained = [report for report in reports if len(report["loss_curve"])]
    draw_loss = [(report["name"], _loss(report)) for report in trained]
    _grid(folder / "loss.png", draw_loss, "step", "loss (dashed: on held-out samples)")
    blocks, _ = split_reports(reports)
    block_errors({recipe.preset: blocks}, folder / "block_error.png")
    propagated_errors({recipe.preset: blocks}, folder / "propagated_error.png")
    draw_borders = [
        (layer.path, _border_curves(layer)) for layer in layers if layer.border is not None
    ]
    _grid(folder / "borders.png", draw_borders, "u = x / step size", "border B(u)")


def comparison_plots(cells: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Writes accuracy, block_error and propagated_error .png over presets.

    Args:
        cells: preset -> the results of its seeds; the blocks drawn are those of the first.
        folder: where to write.

    Raises:
        InputError: matplotlib is not installed.
    """
    accuracy(cells, folder / "accuracy.png")
    groups: dict[tuple[str, ...], dict[str, Any]] = collections.defaultdict(dict)
    for preset, of_preset in cells.items():
        blocks = of_preset[0]["blocks"]
        groups[tuple(block["name"] for block in blocks)][preset] = blocks
    # A preset that works layer by layer has other blocks, which share no axes with the rest.
    alike = max(groups.values(), key=len)
    block_errors(alike, folder / "block_error.png")
    propagated_errors(alike, folder / "propagated_error.png")


def accuracy(cells: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """The score of every preset, one dot a seed and a bar at the mean, against float."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(1.2 * len(cells) + 2, 4), layout="constrained")
    for position, of_preset in enumerate(cells.values()):
        scores = [cell["quantized"][cell["metric"]] for cell in of_preset]
        axes.bar(position, np.mean(scores), color=f"C{position}", alpha=0.6)
        axes.plot([position] * len(scores), scores, "k.")
    any_cell = next(iter(cells.values()))[0]
    metric = any_cell["metric"]
    axes.axhline(any_cell["float"][metric], color="k", ls="--", label="float")
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set_ylabel(f"{metric_name(metric)} %")
    axes.legend()
    _save(plt, figure, path)


def stacked_bars(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], label: str, path: Path
) -> None:
    """One bar a name, made of the parts: ``parts[part]`` has its height in every bar."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(1.2 * len(names) + 4, 5), layout="constrained")
    bottom = np.zeros(len(names))
    for part, heights in parts.items():
        axes.bar(range(len(names)), heights, bottom=bottom, label=part)
        bottom = bottom + np.asarray(heights)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel(label)
    figure.legend(*(part[::-1] for part in axes.get_legend_handles_labels()), fontsize=7,
                  loc="outside right upper")  # fmt: skip
    _save(plt, figure, path)


def block_errors(reports: Mapping[str, Sequence[Report]], path: Path) -> None:
    """Error of every block's output against float, before (hollow) and after reconstruction."""
    plt = require_matplotlib()
    names = [report["name"] for report in next(iter(reports.values()))]
    figure, axes = plt.subplots(figsize=(0.7 * len(names) + 3, 4.5), layout="constrained")
    for index, (preset, of_preset) in enumerate(reports.items()):
        positions = np.arange(len(names)) + 0.1 * (index - (len(reports) - 1) / 2)
        start, final = (
            [report[field] for report in of_preset] for field in ("start_error", "final_error")
        )
        axes.plot(positions, start, "o", color=f"C{index}", mfc="none")
        axes.plot(positions, final, "o", color=f"C{index}", label=preset)
        _log_scale(axes, start, final)
    axes.set_ylabel("output error (hollow: before)")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    axes.legend()
    _save(plt, figure, path)


def front(allocation: Any, path: Path) -> None:
    """The predicted degradation of an ``Allocation``, and of its front, against what they cost.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = require_matplotlib()
    counted = allocation.budget.counted
    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for points, style in ((allocation.front, "o-"), ([allocation], "r*")):
        costs = [cost_of(point.costs, counted) for point in points]
        axes.plot(costs, [point.degradation for point in points], style)
    _log_scale(axes, [point.degradation for point in allocation.front])
    axes.set_xlabel(f"{counted.replace('_', ' ')} (star: the budget)")
    axes.set_ylabel("predicted output error")
    _save(plt, figure, path)


def propagated_errors(reports: Mapping[str, Sequence[Report]], path: Path) -> None:
    """Mean of x' - x at the input of every block against |x'| in 16 clusters (paper, Fig. 2)."""
    drawings = []
    for index, report in enumerate(next(iter(reports.values()))):
        clusters = {
            preset: np.array(of_preset[index]["propagated"], np.float64).reshape(-1, 4)
            for preset, of_preset in reports.items()
        }
        if not any(len(rows) for rows in clusters.values()):
            continue  # the first block reads the network's exact input
        drawings.append((report["name"], _propagated(clusters)))
    _grid(path, drawings, "|x'|", "mean of x' - x", legend=len(reports) > 1)


def _propagated(clusters: Mapping[str, np.ndarray]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for index, (preset, rows) in enumerate(clusters.items()):
            rows = rows[rows[:, COUNT] > 0]
            axes.plot(rows[:, CENTRE], rows[:, MEAN], ".-", color=f"C{index}", label=preset)
            if len(clusters) == 1:
                low, high = (rows[:, MEAN] + sign * rows[:, DEVIATION] for sign in (-1, 1))
                axes.fill_between(rows[:, CENTRE], low, high, alpha=0.2)
        axes.axhline(0, color="k", lw=0.5)

    return draw


def _loss(report: Report) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        drawn = []
        for name, style in (("loss_curve", "-"), ("held_out_curve", "--")):
            steps, losses = np.reshape(np.asarray(report.get(name, ()), np.float64), (-1, 2)).T
            axes.plot(steps, losses, style, color="C0")
            drawn.append(losses)
        _log_scale(axes, *drawn)

    return draw


def _border_curves(layer: Any) -> Callable[[Any], None]:
    """Draws the borders of a few columns of a layer, those that bend the most."""

    def draw(axes: Any) -> None:
        u, curves = border_curves(layer, 101)
        for curve in curves:
            axes.plot(u, curve, lw=1)
        axes.axhline(0.5, color="k", ls="--", lw=0.8)

    return draw


def _log_scale(axes: Any, *values: Any) -> None:
    """A logarithmic axis, unless there is nothing positive to put on it."""
    if any(np.any(np.asarray(value, np.float64) > 0) for value in values):
        axes.set_yscale("log")


def _grid(
    path: Path, drawings: Sequence[Drawing], x_label: str, y_label: str, legend: bool = False
) -> None:
    """Draws small multiples; writes nothing if there are no drawings."""
    if not drawings:
        return
    plt = require_matplotlib()
    columns = min(GRID_COLUMNS, len(drawings))
    rows = -(-len(drawings) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False, layout="constrained"
    )
    for axes, drawing in zip(grid.flat, drawings, strict=False):
        title, draw = drawing
        draw(axes)
        axes.set_title(title, fontsize=7)
        axes.tick_params(labelsize=7)
    for axes in grid.flat[len(drawings) :]:
        axes.set_visible(False)
    if legend:
        grid.flat[0].legend(fontsize=7)
    figure.supxlabel(x_label)
    figure.supylabel(y_label)
    _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
