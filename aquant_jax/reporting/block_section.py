"""The blocks in a report: their errors, losses and propagated errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
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
    groups: dict[tuple[str, ...], dict[int, Run]] = {}
    for place, run in enumerate(runs):
        names = tuple(block["name"] for block in run.results["blocks"])
        if names:
            groups.setdefault(names, {})[place] = run
    made: list[Element] = []
    for alike in groups.values():
        if len(runs) > 1:
            made.append(_legend(alike))
        made += _group(alike)
    made += [element for place, run in enumerate(runs) for element in _stage(place, run)]
    made += [tag("p", text, class_="note") for run in runs if (text := _devices(run))]
    return made or None


def _devices(run: Run) -> str | None:
    """Which blocks were learned on how many devices, unless all were on one."""
    stages = [*run.results["blocks"], *filter(None, [run.results.get("finetune")])]
    found = groupby(stages, lambda stage: stage.get("devices", 1))
    groups = [(devices, [stage["name"] for stage in alike]) for devices, alike in found]
    if len(groups) < 2:
        several = [devices for devices, _ in groups if devices > 1]
        return f"{run.name}: learned on {several[0]} devices." if several else None
    listed = ", ".join(
        f"{' to '.join(dict.fromkeys((names[0], names[-1])))} on {devices}"
        for devices, names in groups
    )
    return (
        f"{run.name}: learned on different numbers of devices: {listed}. From {groups[1][1][0]} "
        "on, codes may differ from those of a run on one number of devices."
    )


def _legend(runs: Mapping[int, Run]) -> Element:
    keys = [
        tag("li", tag("span", class_="key", style=f"background: var(--s{place % 8})"), run.name)
        for place, run in runs.items()
    ]
    return tag("ul", *keys, class_="legend")


def _group(runs: Mapping[int, Run]) -> list[Element]:
    first = next(iter(runs.values()))
    losses, errors = [], []
    for number, block in enumerate(first.results["blocks"][:MOST_BLOCKS]):
        curves = _known({p: run.curves.get(block["index"], ()) for p, run in runs.items()})
        if curves:
            losses.append(tag("figure", figures.losses(block["name"], curves)))
        blocks = {place: run.results["blocks"][number] for place, run in runs.items()}
        clusters = _known({place: block["propagated"] for place, block in blocks.items()})
        if clusters:
            errors.append(tag("figure", figures.propagated(block["name"], clusters)))
    drawing = figures.block_errors({place: run.results["blocks"] for place, run in runs.items()})
    wide = tag("figure", drawing, class_="wide")
    made = [tag("div", wide, _table(first), class_="split") if len(runs) == 1 else wide]
    for head, drawn in ((LOSS, losses), (PROPAGATED, errors)):
        if drawn:
            made += [tag("p", head, class_="note"), tag("div", *drawn, class_="figures")]
    return made


def _known(rows: Mapping[int, Any]) -> dict[int, Any]:
    return {place: value for place, value in rows.items() if len(value)}


def _stage(place: int, run: Run) -> list[Element]:
    stage = run.results.get("finetune")
    if not stage:
        return []
    name = f"{stage['name']} ({run.name})"
    drawing = figures.losses(name, {place: stage["loss_curve"]}, stage["held_out_curve"])
    note = tag("figcaption", "Dashed: on the samples held out.")
    return [tag("h3", name), tag("figure", drawing, note, class_="wide")]


def _table(run: Run) -> Element:
    columns = [
        Column("block", False), Column("layers"), Column("steps"), Column("before"),
        Column("error", note="after reconstruction"), Column("seconds", decimals=1),
        Column("note", False),
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
