"""The blocks in a report: their errors, losses and propagated errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from aquant_jax.reporting import figures
from aquant_jax.reporting.html import Column, table, tag
from aquant_jax.reporting.run import Run

LOSS = "Reconstruction loss over the steps of every block, each value the mean since the last one."
PROPAGATED = (
    "Propagated error: the mean of x' − x at the input of every block by the magnitude |x'|, "
    "where x' is the activation behind quantized blocks and x the float one; the band is one "
    "standard deviation."
)
MOST_BLOCKS = 80  # with figures of their own


def section(runs: Sequence[Run]) -> list[Element] | None:
    """Runs with the same blocks share axes; a preset that works layer by layer has others."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        names = tuple(block["name"] for block in run.results["blocks"])
        if names:
            groups.setdefault(names, []).append(run)
    made: list[Element] = []
    for alike in groups.values():
        if len(groups) > 1:
            made.append(tag("h3", ", ".join(run.name for run in alike)))
        made += _group(alike)
    made += [element for run in runs for element in _stage(run)]
    if len(runs) == 1 and made:
        made.insert(1, _table(runs[0]))
    return made or None


def _group(runs: Sequence[Run]) -> list[Element]:
    by_name = {run.name: run.results["blocks"] for run in runs}
    losses, errors = [], []
    for place, block in enumerate(runs[0].results["blocks"][:MOST_BLOCKS]):
        curves = {run.name: run.curves.get(block["index"], ()) for run in runs}
        if any(map(len, curves.values())):
            losses.append(tag("figure", figures.losses(block["name"], _known(curves))))
        clusters = {name: blocks[place]["propagated"] for name, blocks in by_name.items()}
        if any(map(len, clusters.values())):
            errors.append(tag("figure", figures.propagated(block["name"], _known(clusters))))
    made = [tag("figure", figures.block_errors(by_name), class_="wide")]
    for head, drawn in ((LOSS, losses), (PROPAGATED, errors)):
        if drawn:
            made += [tag("p", head, class_="note"), tag("div", *drawn, class_="figures")]
    return made


def _known(rows: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rows.items() if len(value)}


def _stage(run: Run) -> list[Element]:
    stage = run.results.get("finetune")
    if not stage:
        return []
    name = f"{stage['name']} ({run.name})"
    drawing = figures.losses(name, {run.name: stage["loss_curve"]}, stage["held_out_curve"])
    note = tag("figcaption", "Dashed: on the samples held out.")
    return [tag("h3", name), tag("figure", drawing, note, class_="wide")]


def _table(run: Run) -> Element:
    columns = [
        Column("block", False), Column("layers"), Column("steps"), Column("error at the start"),
        Column("error"), Column("seconds"), Column("note", False),
    ]  # fmt: skip
    rows = [
        [
            block["name"], len(block["layers"]), block["steps"], block["start_error"],
            block["final_error"], block["seconds"],
            "fell back to nearest" if block["fell_back_to_nearest"] else None,
        ]
        for block in run.results["blocks"]
    ]  # fmt: skip
    return table("blocks-table", columns, rows, "Blocks")
