"""Quantizes one network by several presets, or fills a table of the paper.

Each seed of a cell is a run with its own folder in the workdir. A finished run is not repeated: the
same command resumes, with more seeds or rows too. Any field of the configs: --config.FIELD=VALUE.

Example:
    python -m launch.sweep --table=3 --models=resnet18 --bits=w2a2 --data_dir=DIR --workdir=runs/3
"""

import csv
import functools
import io
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

import aquant_jax as aq
from aquant_jax.errors import InputError
from aquant_jax.reporting.run import bit_width, metric_name
from aquant_jax.terminal import show_markdown
from launch.lib import (
    cells,
    command_line,
    executors,
    memory_limits,
    meshes,
    paper_tables,
    plots,
    process,
    reports,
)
from launch.lib.executors import Executor
from launch.lib.paper_tables import TABLES
from launch.lib.run_directory import RunDirectory, claim

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRESETS = list(TABLES["1"].rows)  # ours last
OF_TABLE = ("models", "bits", "rows", "variant")  # flags
Planned = dict[str, dict[tuple[str, str], cells.Cell]]  # model -> (bits, row) -> cell


class Entry(NamedTuple):
    """One cell of the written table; ``scores`` has one value a seed."""

    model: str
    bits: str
    row: str
    float_score: float
    scores: list[float]
    paper: float | None
    steps: int
    seconds: float
    device: str


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    command_line.define_path(values, "workdir", None, "folder to write into; required")
    flags.DEFINE_string("config", None, "config file, file.py:variant", flag_values=values)
    known = f"with --config: rows (default {','.join(PRESETS)})"
    flags.DEFINE_list("presets", None, known, flag_values=values)
    tables = "1: models x bits x presets, 2: BERT on GLUE, 3: ablation of the border"
    flags.DEFINE_enum("table", None, list(TABLES), tables, flag_values=values)
    for name, of in (("models", "columns"), ("bits", "bit-widths"), ("rows", "rows")):
        flags.DEFINE_list(name, None, f"with --table: {of}; all by default", flag_values=values)
    flags.DEFINE_string("variant", None, "with --table: added to every variant", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "seeds of every cell", flag_values=values)
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/ and weights/")
    meshes.define_flag(values)
    memory_limits.define_flag(values)
    executors.define_flags(values)
    flags.mark_flags_as_required(["workdir"], flag_values=values)


def check_mode(values: Any) -> None:
    """One line where flags do not belong together."""
    if (values.config is None) == (values.table is None):
        raise InputError("give --config=FILE to compare presets, or --table to fill a table")
    other, mode = ("presets",), "--config"
    if values.config is not None:
        other, mode = OF_TABLE, "--table"
    for name in other:
        if values[name].value is not None:
            raise InputError(f"--{name} belongs to {mode}")


def compare(
    values: Any, execute: Executor, planned: list[cells.Cell], directory: RunDirectory
) -> str:
    """Runs every preset that is not finished; returns the table that it writes."""
    results = execute({directory.path: planned})[directory.path]
    rows = [summarize(preset, runs) for preset, runs in results.items()]
    plots.comparison_plots(results, directory.plots)
    text = presets_table(rows)
    last = results[planned[-1].name][-1]  # not of this process, which computed nothing with Ray
    where = {name: last[name] for name in ("device", "versions")}
    where["command"] = process.command()
    directory.finish({"config": values.config, "rows": rows, "table": text} | where)
    return text


def plan_presets(values: Any, overrides: dict[str, str]) -> list[cells.Cell]:
    """A cell for every preset that the flags ask for.

    Raises:
        InputError: no preset, or an unknown one.
    """
    presets = PRESETS if values.presets is None else list(dict.fromkeys(values.presets))
    if not presets:
        raise InputError(f"no presets; there are: {', '.join(aq.recipes.PRESETS)}")
    return [
        cells.Cell(
            preset,
            f"{values.config},preset={preset}",
            cells.load_config(values.config, overrides, f"preset={preset}"),
        )
        for preset in presets
    ]


def summarize(preset: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and standard error of the runs of a preset."""
    scores = [run["quantized"][run["metric"]] for run in runs]
    std = statistics.stdev(scores) if len(scores) > 1 else None
    return {
        "preset": preset,
        "metric": runs[0]["metric"],
        "weight_bits": runs[0]["weight_bits"],
        "act_bits": runs[0]["act_bits"],
        "seeds": {str(run["seed"]): run["quantized"] for run in runs},
        "mean": statistics.fmean(scores),
        "std": std,
        "standard_error": None if std is None else std / math.sqrt(len(scores)),
        "float": runs[0]["float"][runs[0]["metric"]],
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "devices": sorted({run["device"] for run in runs}),
    }


def among_the_best(rows: Sequence[dict[str, Any]]) -> set[str]:
    """The presets whose mean is less than two standard errors of the difference below the best.

    Two standard errors are the usual 95%. Without several seeds of each preset, none.
    """
    errors = {row["preset"]: row["standard_error"] for row in rows}
    if len(rows) < 2 or None in errors.values():
        return set()
    best = max(rows, key=lambda row: row["mean"])
    return {
        row["preset"]
        for row in rows
        if best["mean"] - row["mean"]
        <= 2 * math.hypot(errors[row["preset"]], errors[best["preset"]])
    }


def presets_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown; the best means are bold, with those that are not clearly worse."""
    best = among_the_best(rows)
    name = metric_name(rows[0]["metric"])
    lines = [
        f"| preset | bits | {name} % | float % | drop | seeds | seconds a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        score = f"{row['mean']:.2f}{spread}"
        score = f"**{score}**" if row["preset"] in best else score
        lines.append(
            f"| {row['preset']} | {bit_width(row['weight_bits'], row['act_bits'])} "
            f"| {score} | {row['float']:.2f} "
            f"| {row['float'] - row['mean']:.2f} | {len(row['seeds'])} "
            f"| {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def fill(values: Any, execute: Executor, planned: Planned, directory: RunDirectory) -> str:
    """Runs every cell of a table that is not finished; returns the table that it writes."""
    entries = run_cells(values, execute, planned, directory.path)
    text = paper_table(entries)
    (directory.path / "table.md").write_text(text)
    (directory.path / "table.csv").write_text(as_csv(entries))
    found = [entry._asdict() for entry in entries]
    directory.finish({"table": values.table, "cells": found, "command": process.command()})
    return text


def plan_table(values: Any, overrides: dict[str, str]) -> Planned:
    """The cells of the table that the flags ask for.

    Raises:
        InputError: a row, model or bit-width that does not exist, listing what does.
    """
    table = TABLES[values.table]
    rows = values.rows or list(table.rows)
    for row in rows:
        if row not in table.rows:
            raise InputError(f"unknown row {row!r} of table {values.table}; {list(table.rows)}")
    planned: Planned = {}
    for model in values.models or table.models:
        if not re.fullmatch(r"\w+", model):  # it names a folder in the workdir
            raise InputError(
                f"{model!r} is not the name of a model; table {values.table} has "
                f"{', '.join(table.models)}"
            )
        file, _, start = table.config.format(model=model).partition(":")
        planned[model] = {}
        for bits in values.bits or table.bits:
            for row in rows:
                preset, fixed = table.rows[row]
                variant = ",".join(filter(None, [start, bits, f"preset={preset}", values.variant]))
                config = cells.load_config(str(CONFIGS / file), {**overrides, **fixed}, variant)
                name = paper_tables.cell_name(bits, row)
                planned[model][bits, row] = cells.Cell(name, f"{file}:{variant}", config)
    return planned


def run_cells(values: Any, execute: Executor, planned: Planned, folder: Path) -> list[Entry]:
    """Runs what is not finished; the results of all cells."""
    table, entries = TABLES[values.table], []
    results = execute(
        {folder / model: list(of_model.values()) for model, of_model in planned.items()}
    )
    for model, of_model in planned.items():
        for (bits, row), cell in of_model.items():
            runs = results[folder / model][cell.name]
            first = runs[0]
            entries.append(
                Entry(
                    model, bits, row, first["float"][first["metric"]],
                    [run["quantized"][first["metric"]] for run in runs],
                    table.paper.get((model, bits, row)),
                    first["recipe"]["reconstruction"]["steps"],
                    statistics.fmean(run["seconds"] for run in runs), first["device"],
                )
            )  # fmt: skip
    return entries


def paper_table(entries: Sequence[Entry]) -> str:
    """A row a method, a column a model, the paper's number in brackets; in Markdown."""
    models = list(dict.fromkeys(entry.model for entry in entries))
    floats = {entry.model: entry.float_score for entry in entries}
    rows: dict[tuple[str, str], dict[str, str]] = {("", "float"): {}}
    for model in models:
        rows["", "float"][model] = _text([floats[model]], paper_tables.FLOAT.get(model))
    for entry in entries:
        row = rows.setdefault((entry.bits, entry.row), {})
        row[entry.model] = _text(entry.scores, entry.paper)
    head = ["bits", "method", *(f"{model} (paper)" for model in models)]
    lines = [head, ["---"] * len(head)]
    lines += [[*key, *(row.get(model, "") for model in models)] for key, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(entries: Sequence[Entry]) -> str:
    """One line a cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Entry._fields)
    for entry in entries:
        scores = " ".join(f"{value:.2f}" for value in entry.scores)
        writer.writerow((entry._asdict() | {"scores": scores, "paper": entry.paper or ""}).values())
    return out.getvalue()


def _text(values: Sequence[float], paper: float | None) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({paper if paper else '-'})"


@command_line.program
def main(argv: list[str]) -> None:
    """Runs every cell that is not finished, then writes the table."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    check_mode(values)
    execute = executors.create(values)  # what is wrong ends it before anything is claimed
    if values.table is None:
        planned = plan_presets(values, overrides)
        mode, write = "config", functools.partial(compare, values, execute, planned)
    else:
        planned = plan_table(values, overrides)
        mode, write = "table", functools.partial(fill, values, execute, planned)
    owner = {"program": "sweep", mode: values[mode].value, "overrides": overrides}
    with claim(values.workdir, owner) as directory:
        text = write(directory)
        reports.write_report(directory.path)
    show_markdown(f"\n{text.rstrip()}")
    print(f"\nin {directory.path}")


if __name__ == "__main__":
    sys.exit(main())
