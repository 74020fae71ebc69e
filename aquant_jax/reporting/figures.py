"""The figures of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from aquant_jax.reporting.svg import FAINT, GRID, INK, SERIES, draw, log_scale

CENTRE, MEAN, DEVIATION, COUNT = range(4)
MOST_CODES = 16  # of a grid that is drawn code by code
Rows = Mapping[int, Any]  # of runs, by their place in the report, which has a colour


def colour(index: int) -> str:
    """The colour of a run, by its place in the report."""
    return SERIES[index % len(SERIES)]


def scores(runs: Mapping[str, Sequence[float]], floating: float | None, unit: str) -> Element:
    """The score of every run, one dot a seed, against the float network."""

    def plot(axes: Any) -> None:
        for row, (_, values) in enumerate(runs.items()):
            mean = float(np.mean(values))
            axes.plot([mean], [row], "|", color=colour(row), ms=16, mew=3)
            axes.plot(values, [row] * len(values), "o", color=colour(row), ms=5, alpha=0.7)
            axes.annotate(f"{mean:.2f}", (mean, row), xytext=(0, 9), fontsize=8,
                          textcoords="offset points", ha="center", color=FAINT)  # fmt: skip
        if floating is not None:
            axes.axvline(floating, color=INK, ls="--", lw=1)
            axes.annotate(f"float {floating:.2f}", (floating, -0.75), xytext=(-4, 0), fontsize=8,
                          textcoords="offset points", ha="right", color=FAINT)  # fmt: skip
        _names(axes, list(runs))
        axes.set_ylim(len(runs) - 0.4, -1)
        axes.set_xlabel(unit)
        axes.margins(x=0.08)

    return draw(plot, f"{unit} of {', '.join(runs)}", 0.9 + 0.36 * len(runs))


def block_errors(runs: Mapping[int, Sequence[Mapping[str, Any]]]) -> Element:
    """The output error of every block, before (hollow) and after reconstruction."""
    names = [block["name"] for block in next(iter(runs.values()))]

    def plot(axes: Any) -> None:
        for line, (index, blocks) in enumerate(runs.items()):
            rows = np.arange(len(names)) + 0.6 * ((line + 0.5) / len(runs) - 0.5)
            start, final = (
                [block[name] or np.nan for block in blocks]
                for name in ("start_error", "final_error")
            )
            axes.hlines(rows, final, start, color=colour(index), lw=1.2, alpha=0.5)
            axes.plot(start, rows, "o", color=colour(index), mfc="none", ms=5)
            axes.plot(final, rows, "o", color=colour(index), ms=5)
        errors = [[b["start_error"], b["final_error"]] for blocks in runs.values() for b in blocks]
        log_scale(axes, "x", errors)
        _names(axes, names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("error of the block's output (hollow: rounded to nearest)")

    height = 0.8 + (0.16 + 0.12 * min(len(runs), 6)) * len(names)
    return draw(plot, "Error of every block before and after reconstruction", height)


def losses(name: str, curves: Rows, held_out: Any = ()) -> Element:
    """Reconstruction loss over the steps of one block; dashed on the samples held out."""

    def plot(axes: Any) -> None:
        for index, curve in curves.items():
            axes.plot(*_columns(curve, 2), color=colour(index))
        log_scale(axes, "y", *(_columns(curve, 2)[1] for curve in curves.values()))
        if len(held_out):
            axes.plot(*_columns(held_out, 2), "--", color=INK)
        axes.set(title=_short(name), xlabel="step")

    return draw(plot, f"Loss of {name} over its steps")


def propagated(name: str, clusters: Rows) -> Element:
    """Mean of ``x' - x`` at the input of a block, against ``|x'|`` (Fig. 2 of the paper)."""

    def plot(axes: Any) -> None:
        for index, rows in clusters.items():
            centre, mean, deviation, _ = _columns(rows, 4)
            axes.plot(centre, mean, ".-", color=colour(index))
            if len(clusters) == 1:
                band = mean - deviation, mean + deviation
                axes.fill_between(centre, *band, color=colour(index), alpha=0.18, lw=0)
        axes.axhline(0, color=FAINT, lw=0.8)
        axes.set(title=_short(name), xlabel="|x'|")

    return draw(plot, f"Propagated error at the input of {name}")


def border(record: Mapping[str, Any], index: int = 0) -> Element:
    """The learned borders of a layer that bend the most, against 0.5 of nearest rounding."""

    def plot(axes: Any) -> None:
        found = record["border_curves"]
        for curve in found["curves"]:
            axes.plot(found["u"], curve, color=colour(index), lw=1, alpha=0.7)
        axes.axhline(0.5, color=FAINT, ls="--", lw=1)
        axes.set(title="border B(u)", xlabel="u = x / step size")

    return draw(plot, f"Learned borders of {record['path']}")


def weights(record: Mapping[str, Any], index: int = 0) -> Element:
    """Float weights in codes (area), the grid (lines) and the share of every code (dots)."""
    codes = np.asarray(record["codes"], np.float64)

    def plot(axes: Any) -> None:
        if "weights" in record:
            _area(axes, record["weights"], colour(index))
        share = codes / max(codes.sum(), 1)
        places = np.arange(len(codes))
        _grid(axes, len(codes))
        if len(codes) <= MOST_CODES:
            axes.vlines(places, 0, share, color=INK, lw=1.5)
            axes.plot(places, share, "o", color=INK, ms=4)
        else:
            axes.plot(places, share, color=INK, lw=0.6)
        axes.set(title="weights", xlabel="code")
        axes.set_ylim(bottom=0)

    return draw(plot, f"Weights of {record['path']} and their grid")


def activations(record: Mapping[str, Any], index: int = 0) -> Element:
    """The layer's input in codes, and the grid that it is rounded to."""

    def plot(axes: Any) -> None:
        _grid(axes, 2 ** record["act_bits"])
        _area(axes, record["activations"], colour(index), log=True)
        axes.set(title="activations", xlabel="code")

    return draw(plot, f"Activations of {record['path']} and their grid")


def memory(parts: Mapping[str, float]) -> Element:
    """Bytes of a network, float and packed, by part."""

    def plot(axes: Any) -> None:
        packed = {name: value for name, value in parts.items() if name != "floating"}
        axes.barh([0], [parts["floating"] / 1024], color=FAINT, height=0.55)
        left = 0.0
        for index, (name, value) in enumerate(packed.items()):
            axes.barh([1], [value / 1024], left=left, color=colour(index), height=0.55, label=name)
            left += value / 1024
        _names(axes, ["float", "packed"])
        axes.set_ylim(1.5, -0.5)
        axes.set_xlabel("KiB")
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.1, 1), borderaxespad=0.2,
                    columnspacing=1.0, handlelength=1.0)  # fmt: skip

    return draw(plot, "Bytes of the network, float and packed", 1.9)


def seconds(blocks: Sequence[Mapping[str, Any]]) -> Element:
    """Wall clock of every block."""

    def plot(axes: Any) -> None:
        values = [block["seconds"] for block in blocks]
        axes.barh(range(len(blocks)), values, color=colour(0), height=0.6)
        _names(axes, [block["name"] for block in blocks])
        axes.set_ylim(len(blocks) - 0.4, -0.6)
        axes.set_xlabel("seconds")

    return draw(plot, "Seconds a block", 0.7 + 0.2 * len(blocks))


def pareto(points: Sequence[Mapping[str, Any]], cost: str) -> Element:
    """Predicted (line, hollow) and measured (filled) degradation against the cost."""

    def plot(axes: Any) -> None:
        ordered = sorted(points, key=lambda point: point["cost"])
        for index, (name, style) in enumerate((("predicted", "o--"), ("measured", "o"))):
            known = [point for point in ordered if point.get(name) is not None]
            axes.plot(
                [point["cost"] for point in known], [point[name] for point in known], style,
                color=colour(index), mfc="none" if index == 0 else colour(index), label=name,
            )  # fmt: skip
        axes.set(xlabel=cost, ylabel="degradation")
        log_scale(axes, "y", np.array([point["predicted"] for point in points]))
        axes.legend()

    return draw(plot, f"Pareto front of degradation against {cost}", 3)


def _area(axes: Any, found: Mapping[str, Any], shade: str, log: bool = False) -> None:
    counts = np.asarray(found["counts"], np.float64)
    edges = np.linspace(found["low"], found["high"], len(counts) + 1)
    share = counts / max(counts.sum(), 1)
    if not log:  # beside shares of codes: shares of the values within a code's width
        share = share / (edges[1] - edges[0])
    axes.stairs(share, edges, fill=True, color=shade, alpha=0.45, lw=0)
    if log:
        log_scale(axes, "y", share)
        axes.set_ylim(bottom=max(share[share > 0].min(initial=1) / 2, 1e-7))


def _grid(axes: Any, levels: int) -> None:
    axes.grid(False, axis="x")
    for code in range(levels) if levels <= MOST_CODES else (0, levels - 1):
        axes.axvline(code, color=GRID, lw=1)


def _columns(rows: Any, count: int) -> np.ndarray:
    """Rows of JSON as columns, without those that are empty clusters."""
    array = np.array(rows, np.float64).reshape(-1, count)
    return array[~np.isnan(array).any(axis=1)].T


def _names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_short(name, 28) for name in names])
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _short(name: str, most: int = 40) -> str:
    """The end of a long name, and no formula: matplotlib reads a dollar as one."""
    shown = name if len(name) <= most else f"…{name[1 - most :]}"
    return shown.replace("$", r"\$")
