"""The layers in a report: a table that sorts, and their borders and histograms with the grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from aquant_jax.reporting import figures
from aquant_jax.reporting.html import Column, table, tag
from aquant_jax.reporting.run import Run

MOST_LAYERS = 64  # with figures: a page stays under 3 MB
COLUMNS = (
    Column("W bits", note="of a weight"),
    Column("A bits", note="of a value of the input"),
    Column("step size"),
    Column("zero"),
    Column("error", note="|y' − y|² / |y|² of the layer's output on its deployed input"),
    Column("block error", note="of the block that it is part of, after reconstruction"),
    Column("border", number=False),
    Column("|B − ½|", note="the largest deviation of a border from nearest rounding"),
    Column("coefficients"),
)
NOTE = (
    "Press a column head to sort by it. Error: |y' − y|² / |y|² of the layer's output on its "
    "deployed input, against float weights and an input that is not rounded. Block error: of the "
    "whole block, after reconstruction. Step size and zero point: of the layer's input. |B − ½|: "
    "the largest deviation of a learned border from nearest rounding."
)


def table_of(runs: Sequence[Run]) -> list[Element] | None:
    """Every layer; with several runs, a row for each of them."""
    known = [run for run in runs if run.layers]
    if not known:
        return None
    several = len(known) > 1
    columns = [Column("layer", False), *([Column("run", False)] if several else []),
               Column("kind", False), Column("weights"), *COLUMNS]  # fmt: skip
    rows = [
        [record["path"], *([run.name] if several else []), *_values(record, errors)]
        for run, errors in ((run, _block_errors(run)) for run in known)
        for record in run.layers
    ]
    if several:
        order = {record["path"]: i for i, record in enumerate(known[0].layers)}
        rows.sort(key=lambda row: order.get(row[0], len(order)))
    return [tag("p", NOTE, class_="note"), table("layers-table", columns, rows, "Layers")]


def _values(record: Mapping[str, Any], errors: Mapping[str, float]) -> list[Any]:
    curves = record.get("border_curves", {})
    size = 1
    for length in record["shape"]:
        size *= length
    border = record["border"] and f"{record['border']}, {record['border_granularity']}"
    return [
        record["kind"], size, record["weight_bits"], record["act_bits"], record["step_size"],
        record["zero_point"], record.get("error"), errors.get(record["path"]), border,
        curves.get("bend"), curves.get("coefficients"),
    ]  # fmt: skip


def _block_errors(run: Run) -> dict[str, float]:
    return {
        path: block["final_error"] for block in run.results["blocks"] for path in block["layers"]
    }


def figures_of(runs: Sequence[Run]) -> list[Element] | None:
    """Borders, weights and activations of every layer, those of several runs side by side."""
    known = [(index, run) for index, run in enumerate(runs) if run.layers]
    if not known:
        return None
    paths = list(dict.fromkeys(record["path"] for _, run in known for record in run.layers))
    text = (
        "In codes: whole numbers are the values of the grid. Weights: the area is the float "
        "weights, where they are known; dots or a line are the share of every code. Activations: "
        "the share of values on a logarithmic axis; what lies outside of the grid is clipped. "
        "Borders: those that bend the most; u is rounded up where its fraction exceeds B(u)."
    )
    made = [tag("p", text, class_="note")]
    if len(paths) > MOST_LAYERS // len(known):
        paths = paths[: MOST_LAYERS // len(known)]
        made.append(tag("p", f"The first {len(paths)} layers are drawn.", class_="note"))
    records = [(i, run, {r["path"]: r for r in run.layers}) for i, run in known]
    for path in paths:
        rows = []
        for index, run, by_path in records:
            label = run.name if len(known) > 1 else None
            drawings = _drawings(by_path[path], index) if path in by_path else ()
            if drawings:
                drawn = [_figure(drawing, label) for drawing in drawings]
                rows.append(tag("div", *drawn, class_="figures"))
        if rows:
            made += [tag("h3", path), *rows]
    return made


def _drawings(record: Mapping[str, Any], index: int) -> list[Element]:
    drawn = []
    if "codes" in record:
        drawn.append(figures.weights(record, index))
    if "activations" in record:
        drawn.append(figures.activations(record, index))
    if "border_curves" in record:
        drawn.append(figures.border(record, index))
    return drawn


def _figure(drawing: Element, label: str | None) -> Element:
    return tag("figure", drawing, tag("figcaption", label) if label else None)
