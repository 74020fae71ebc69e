"""A report as one HTML file without any reference to another."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any
from xml.etree.ElementTree import Element

from aquant_jax.reporting import (
    allocation_section,
    block_section,
    cost_section,
    figures,
    layer_sections,
)
from aquant_jax.reporting.html import Column, document, number, table, tag
from aquant_jax.reporting.run import Run, metric_name

MOST_DRAWN = 8  # runs whose blocks are drawn over each other


def page(runs: Sequence[Run], title: str, command: str | None = None) -> str:
    """The text of the report of a run, or of several side by side.

    Args:
      runs: at least one.
      title: of the page.
      command: that made them; None takes the one of a single run.

    Raises:
      InputError: matplotlib is not installed.
    """
    sections = [
        ("runs", "Runs", _runs(runs) if len(runs) > 1 else None),
        ("pareto", "Pareto front", allocation_section.front(runs)),
        ("allocation", "Allocation", allocation_section.layers(runs)),
        ("layers", "Layers", layer_sections.table_of(runs)),
        ("blocks", "Blocks", block_section.section(_drawn(runs))),
        ("details", "Borders and grids", layer_sections.figures_of(runs)),
        ("cost", "Memory and time", cost_section.section(runs)),
        ("origin", "How to repeat it", _origin(runs, command)),
    ]
    shown = [(name, head, body) for name, head, body in sections if body]
    links = [tag("li", tag("a", head, href=f"#{name}")) for name, head, _ in shown]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", _file("style.css")),
    )
    content = [tag("section", tag("h2", head), *body, id=name) for name, head, body in shown]
    body = tag(
        "body",
        tag("a", "Skip to the results", href="#content", class_="skip"),
        tag("header", tag("h1", title), tag("p", _subtitle(runs), class_="note"), _tiles(runs)),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *content, id="content"),
        tag("script", _file("script.js")),
    )
    return document(tag("html", head, body, lang="en"))


def _file(name: str) -> str:
    return resources.files("aquant_jax.reporting").joinpath(name).read_text(encoding="utf-8")


def _subtitle(runs: Sequence[Run]) -> str:
    first = runs[0].results
    parts = [first.get("config") if len(runs) == 1 else None, first.get("device")]
    if (samples := first.get("test_samples")) is not None:
        parts.append(f"scored on {samples:,.0f} samples")
    return " · ".join(part for part in parts if part)


def _tiles(runs: Sequence[Run]) -> Element | None:
    """The headline: of a single run, or of the best of several."""
    known = [run for run in runs if run.score is not None]
    best = max(known, key=lambda run: run.score or 0.0) if known else runs[0]
    found: list[tuple[str, str]] = []
    if len(runs) > 1:
        found.append((f"best of {len(runs)} runs", best.name))
    if best.score is not None and best.float_score is not None:
        name = metric_name(best.results["metric"])
        found.append((f"{name}, quantized to {best.bits}", f"{best.score:.2f}%"))
        found.append((f"{name}, float", f"{best.float_score:.2f}%"))
        found.append(("lost", f"{best.lost:.2f}"))
    size = best.results.get("bytes")
    if size:
        packed = sum(value for name, value in size.items() if name != "floating")
        found.append(("of the float network's bytes", f"{100 * packed / size['floating']:.1f}%"))
    made = "reconstruction" if best.results["blocks"] else "measuring"
    found.append((f"of {made}", f"{best.results['seconds']:.0f} s"))
    tiles = [tag("div", tag("b", value), tag("span", text), class_="tile") for text, value in found]
    return tag("div", *tiles, class_="tiles")


def _runs(runs: Sequence[Run]) -> list[Element]:
    """A row a run, the means over seeds, and a figure of the scores."""
    unit = metric_name(runs[0].results["metric"]) if runs[0].score is not None else "score"
    columns = [
        Column("run", False), Column("bits", False), Column("seed"),
        Column(f"{unit} %", decimals=2), Column("float %", decimals=2), Column("lost", decimals=2),
        Column("seconds", decimals=1), Column("device", False),
    ]  # fmt: skip
    rows = []
    for run in runs:
        found = run.results
        name = tag("a", run.name, href=run.link) if run.link else run.name
        rows.append(
            [name, run.bits, found.get("seed"), run.score, run.float_score, run.lost,
             found["seconds"], found.get("device")]
        )  # fmt: skip
    tables = [table("runs-table", columns, rows, "Runs")]
    groups: dict[str, list[float]] = {}
    for run in runs:
        if run.score is not None:
            groups.setdefault(run.label, []).append(run.score)
    if not groups:
        return tables
    if len(groups) < len(runs):
        tables.insert(0, _means(groups))
    floats = {run.float_score for run in runs}
    figure = figures.scores(groups, floats.pop() if len(floats) == 1 else None, f"{unit} %")
    note = tag("figcaption", "A dot is a seed, a bar the mean; dashed: the float network.")
    wide = tag("figure", figure, note, class_="wide")
    return [tag("div", wide, tag("div", *tables), class_="split")]


def _means(groups: Mapping[str, Sequence[float]]) -> Element:
    spread = [Column(name, decimals=2) for name in ("mean", "std")]
    columns = [Column("runs", False), Column("seeds"), *spread]
    rows = [
        [name, len(values), statistics.fmean(values),
         statistics.stdev(values) if len(values) > 1 else None]
        for name, values in groups.items()
    ]  # fmt: skip
    return table("seeds-table", columns, rows, "Mean over seeds")


def _drawn(runs: Sequence[Run]) -> list[Run]:
    """The first seed of each, as far as they can be told apart in one figure."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.label, run._replace(name=run.label))
    return list(first.values())[:MOST_DRAWN]


def _origin(runs: Sequence[Run], command: str | None) -> list[Element]:
    commands = [command] if command else [run.results.get("command") for run in runs]
    found: list[Element] = [
        tag("pre", tag("code", text), tabindex="0") for text in dict.fromkeys(commands) if text
    ]
    versions = runs[0].results.get("versions", {})
    pairs = [
        tag(*pair) for item in versions.items() for pair in zip(("dt", "dd"), item, strict=True)
    ]
    if pairs:
        found.append(tag("dl", *pairs))
    for run in _drawn(runs):
        fields = [
            tag(*pair)
            for key, value in _flat(run.results["recipe"])
            for pair in (("dt", key), ("dd", value))
        ]
        name = f"Recipe of {run.name}" if len(runs) > 1 else "Recipe"
        found.append(tag("details", tag("summary", name), tag("dl", *fields)))
    return found


def _flat(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in fields.items():
        inner = isinstance(value, Mapping)
        found += _flat(value, f"{key}.") if inner else [(f"{prefix}{key}", number_or_text(value))]
    return found


def number_or_text(value: Any) -> str:
    """A value of a recipe."""
    return number(value) if isinstance(value, float) else str(value)
