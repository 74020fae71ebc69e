"""Bytes, memory and time in a report."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from aquant_jax.reporting import figures
from aquant_jax.reporting.html import Column, table, tag
from aquant_jax.reporting.run import Run


def section(runs: Sequence[Run]) -> list[Element] | None:
    """A row a run; of a single one, figures of the parts and of the blocks."""
    runs = [run for run in runs if run.results["blocks"] or run.results.get("bytes")]
    if not runs:
        return None  # allocations
    columns = [
        Column("run", False), Column("float bytes"), Column("packed bytes"),
        Column("times smaller", decimals=1), Column("of them borders"),
        Column("reconstruction, s", decimals=1),
        Column("peak memory, MiB", decimals=0, note="of the process that made it"),
    ]  # fmt: skip
    rows = []
    for run in runs:
        size = run.results.get("bytes") or {}
        packed = sum(value for name, value in size.items() if name != "floating")
        peak = run.results.get("peak_bytes")
        rows.append(
            [run.name, size.get("floating"), packed or None,
             size["floating"] / packed if packed else None, size.get("borders"),
             run.results["seconds"], peak and peak / 2**20]
        )  # fmt: skip
    made = [table("cost-table", columns, rows, "Memory and time")]
    if len(runs) == 1:
        size, blocks = runs[0].results.get("bytes"), runs[0].results["blocks"]
        drawn = [figures.memory(size)] if size else []
        drawn += [figures.seconds(blocks)] if blocks else []
        wide = [tag("figure", drawing, class_="wide") for drawing in drawn]
        made.append(tag("div", *wide, class_="split"))
    return made
