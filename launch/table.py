"""Fills a table of the paper: every cell that is not finished is run, then the table is written.

    python -m launch.table --table=1 --data_dir=DIR --workdir=runs/table1
    python -m launch.table --table=3 --models=cifar10_resnet20 --bits=w2a2 --seeds=0,1,2 \\
        --data_dir=../shared/data --workdir=runs/ablation --config.recipe.steps=400

Table 1 is models x bits x presets; Table 2 is BERT on the tasks of GLUE, each with its fine-tuned
weights; Table 3 is the ablation of the border: linear or quadratic, fused or not. A model is a
file in configs/, or a task. Each run has the folder MODEL/BITS-ROW-sSEED in the
workdir, so an interrupted table goes on where it stopped, and rows and seeds can be added.
table.md and table.csv have the paper's numbers, marked so, beside ours.
"""

import csv
import io
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from aquant_jax.errors import InputError
from configs import variants
from launch.lib import cells, command_line, paper_tables
from launch.lib.run_directory import claim

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ABLATION = {
    "aquant": {"recipe.border": "quadratic", "recipe.fused": "True"},
    "linear": {"recipe.border": "linear", "recipe.fused": "True"},
    "not fused": {"recipe.border": "quadratic", "recipe.fused": "False"},
    "linear, not fused": {"recipe.border": "linear", "recipe.fused": "False"},
}


class Table(NamedTuple):
    """What a table has: rows as (preset, overrides) by name, and the paper's values.

    Attributes:
        models: its columns: networks, or tasks of one network.
        bits: its bit-widths.
        rows: presets.
        paper: by (model, bits, row).
        config: file and start of the variant of a column.
    """

    models: tuple[str, ...]
    bits: tuple[str, ...]
    rows: dict[str, tuple[str, dict[str, str]]]
    paper: dict[tuple[str, str, str], float]
    config: str = "{model}.py"


TABLES = {
    "1": Table(
        paper_tables.MODELS,
        ("w4a4", "w2a4", "w3a3", "w2a2"),
        {name: (name, {}) for name in variants.PRESETS[1:] + variants.PRESETS[:1]},
        paper_tables.TABLE_1,
    ),
    "2": Table(
        paper_tables.TASKS,
        ("w4a4",),
        {name: (name, {}) for name in ("adaround", "aquant_bert")},
        paper_tables.TABLE_2,
        "glue_bert.py:{model}",
    ),
    "3": Table(
        ("resnet18", "regnetx_600mf"),
        ("w2a2", "w3a3"),
        {name: ("aquant", overrides) for name, overrides in ABLATION.items()},
        paper_tables.TABLE_3,
    ),
}


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
    flags.DEFINE_enum("table", None, list(TABLES), "of the paper", flag_values=values)
    flags.DEFINE_list("models", None, "columns; the table's by default", flag_values=values)
    flags.DEFINE_list("bits", None, "such as w2a2; the table's by default", flag_values=values)
    flags.DEFINE_list("rows", None, "the table's by default", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "seeds of every cell", flag_values=values)
    flags.DEFINE_string("variant", "", "appended to the variant, dataset=...", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder to write into", flag_values=values)
    flags.DEFINE_string(
        "data_dir", "~", "holds tensorflow_datasets/ and weights/", flag_values=values
    )
    flags.mark_flags_as_required(["table", "workdir"], flag_values=values)


Planned = dict[str, dict[tuple[str, str], cells.Cell]]  # model -> (bits, row) -> cell


def plan(values: Any, overrides: dict[str, str]) -> Planned:
    """The cells of the table that the flags ask for.

    Raises:
        InputError: a row, model or bit-width that does not exist, listing what does.
    """
    table = TABLES[values.table]
    chosen = values.rows or list(table.rows)
    for row in chosen:
        if row not in table.rows:
            raise InputError(f"unknown row {row!r} of table {values.table}; {list(table.rows)}")
    planned: Planned = {}
    for model in values.models or table.models:
        file, _, start = table.config.format(model=model).partition(":")
        planned[model] = {}
        for bits in values.bits or table.bits:
            for row in chosen:
                preset, own = table.rows[row]
                variant = ",".join(filter(None, [start, bits, f"preset={preset}", values.variant]))
                config = cells.load_config(str(CONFIGS / file), {**overrides, **own}, variant)
                name = f"{bits}-{row.replace(', ', '-').replace(' ', '-')}"
                planned[model][bits, row] = cells.Cell(name, f"{file}:{variant}", config)
    return planned


def entries(values: Any, planned: Planned, folder: Path) -> list[Entry]:
    """Runs what is not finished; the results of all cells."""
    table, seeds, found = TABLES[values.table], cells.parse_seeds(values.seeds), []
    for model, of_model in planned.items():
        runs = cells.run(folder / model, values.data_dir, list(of_model.values()), seeds)
        for (bits, row), cell in of_model.items():
            results = runs[cell.name]
            first = results[0]
            found.append(
                Entry(
                    model, bits, row, first["float"][first["metric"]],
                    [result["quantized"][first["metric"]] for result in results],
                    table.paper.get((model, bits, row)), first["recipe"]["steps"],
                    statistics.fmean(result["seconds"] for result in results), first["device"],
                )
            )  # fmt: skip
    return found


def markdown(found: list[Entry]) -> str:
    """The table in Markdown: a row a method, a column a model, the paper's number in brackets."""
    models = list(dict.fromkeys(entry.model for entry in found))
    floats = {entry.model: entry.float_score for entry in found}
    rows = {(entry.bits, entry.row): {} for entry in found}
    for entry in found:
        rows[entry.bits, entry.row][entry.model] = _text(entry.scores, entry.paper)
    rows = {
        ("", "float"): {m: _text([floats[m]], paper_tables.FLOAT.get(m)) for m in models},
        **rows,
    }
    head = ["bits", "method", *(f"{model} (paper)" for model in models)]
    lines = [head, ["---"] * len(head)]
    lines += [[*key, *(row.get(model, "") for model in models)] for key, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def as_csv(found: list[Entry]) -> str:
    """One line a cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Entry._fields)
    for entry in found:
        scores = " ".join(f"{value:.2f}" for value in entry.scores)
        writer.writerow(entry._replace(scores=scores, paper=entry.paper or ""))
    return out.getvalue()


def _text(values: list[float], stated: float | None) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({stated if stated else '-'})"


@command_line.program
def main(argv: list[str]) -> None:
    """Runs every cell that is not finished, then writes the table."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    planned = plan(values, overrides)
    owner = {"program": "table", "table": values.table, "overrides": overrides}
    with claim(values.workdir, owner) as folder:
        found = entries(values, planned, folder.path)
        text = markdown(found)
        (folder.path / "table.md").write_text(text)
        (folder.path / "table.csv").write_text(as_csv(found))
        folder.finish({"table": values.table, "cells": [entry._asdict() for entry in found]})
    print(f"\n{text}\nin {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
