"""Bits under a budget in a report: the Pareto front, and the choice of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from aquant_jax.reporting import figures
from aquant_jax.reporting.html import Column, table, tag
from aquant_jax.reporting.run import THIS, Run

NOTE = (
    "The error of the network's output on calibration samples. Predicted: the sum that the "
    "allocation made least. Measured: of a network that was quantized so."
)


def front(runs: Sequence[Run]) -> list[Element] | None:
    """A figure and a table of each front, with the points of the runs that share it."""
    fronts: dict[str, tuple[Run, list[Mapping[str, Any]]]] = {}
    for run in runs:
        points = run.results.get("pareto") or ()
        shared = [point for point in points if point.get("name") != THIS]
        name = run.name if len(runs) > 1 else THIS
        own = [{**point, "name": name} for point in points if point.get("name") == THIS]
        if points:
            known = fronts.setdefault(repr(shared), (run, shared))
            known[1].extend(own)
    found: list[Element] = []
    for index, (run, points) in enumerate(fronts.values()):
        unit = run.results.get("pareto_cost", "cost")
        columns = [
            Column("allocation", False), Column(unit), Column("predicted"), Column("measured"),
        ]  # fmt: skip
        rows = [
            [point.get("name", i), point["cost"], point["predicted"], point.get("measured")]
            for i, point in enumerate(points)
        ]
        title = "Pareto front" if len(fronts) == 1 else f"Pareto front of {run.name}"
        name = f"pareto-table-{index}" if index else "pareto-table"
        note = tag("figcaption", NOTE)
        found.append(tag("figure", figures.pareto(points, unit), note, class_="wide"))
        found.append(table(name, columns, rows, title))
    return found or None


def layers(runs: Sequence[Run]) -> list[Element] | None:
    """What an allocation chose for every layer; a row for each of several runs."""
    known = [run for run in runs if run.results.get("allocation")]
    if not known:
        return None
    several = len(known) > 1
    columns = [
        Column("layer", False), *([Column("run", False)] if several else []),
        Column("choice", False, note="a16: an input in float"),
        Column("error alone", note="predicted, of the output with this layer alone quantized"),
        Column("bytes"),
    ]  # fmt: skip
    rows = [
        [row["layer"], *([run.name] if several else []), row["choice"], row["error"], row["bytes"]]
        for run in known
        for row in run.results["allocation"]
    ]
    return [table("allocation-table", columns, rows, "Bits of every layer")]
