"""The generated tables of the ablation of learned borders."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from table_text import Json, Load, markdown, score

SEEDS = ("0", "1", "2")
RATE = re.compile(r"\(range / Qmax\)\^(\S+|\(.*?\)) times")
# The default of the study's last part; rows of that part name the fields that they change.
DEFAULT = {"border": "quadratic", "border_granularity": "element", "rate of u^k": "k - 1"}


def _rate(row: Json) -> str:
    """The power of range / Qmax by which a coefficient of u^k learns faster."""
    found = RATE.search(row.get("code", ""))
    return found[1].strip("()") if found else "k"


def _text(value: Any) -> str:
    return "none" if value is None else str(value)


def _scores(row: Json) -> list[str]:
    top1 = row["top1"]
    each = [f"{top1[seed]:.2f}" if seed in top1 else "not run" for seed in SEEDS]
    return [*each, f"{row['mean']:.2f}" if len(top1) > 1 else ""]


def _table(rows: Sequence[Json], label: Callable[[Json], Json]) -> str:
    """One line a row, with a column for every field that has more than one value."""
    labels = [label(row) for row in rows]
    names = list(dict.fromkeys(name for fields in labels for name in fields))
    told = [n for n in names if len({_text(fields[n]) for fields in labels if n in fields}) > 1]
    lines = [
        [*(_text(fields.get(name, "")) for name in told), *_scores(row)]
        for fields, row in zip(labels, rows, strict=True)
    ]
    return markdown([*told, *(f"seed {seed}" for seed in SEEDS), "mean"], lines)


def _whole(row: Json) -> Json:
    steps = {"steps": row["steps"], "batch": row["batch_size"]}
    return {"preset": row["preset"], **steps, **row["fields"], "rate of u^k": _rate(row)}


def _rows(load: Load) -> tuple[list[Json], list[Json], list[Json]]:
    """The three parts of the study: first, second, around the default."""
    rows = load("border_ablation_w2a2")["rows"]
    parts: tuple[list[Json], list[Json], list[Json]] = ([], [], [])
    for row in rows:
        code = row.get("code", "")
        parts[0 if not code else 1 if code.startswith("trained") else 2].append(row)
    best: dict[str, Json] = {}  # some settings were measured again with more seeds
    for row in parts[1]:
        key = str(_whole(row))
        if key not in best or len(row["top1"]) > len(best[key]["top1"]):
            best[key] = row
    return parts[0], list(best.values()), parts[2]


def first(load: Load) -> str:
    """Borders shared across taps; how they are learned and how the steps end."""
    return _table(_rows(load)[0], _whole)


def second(load: Load) -> str:
    """Form, sharing, phi, and the unit of the learning rates."""
    return _table(_rows(load)[1], _whole)


def default(load: Load) -> str:
    """One change to the default at a time."""
    _, before, rows = _rows(load)

    def changed(row: Json) -> str:
        told = [f"`{name}={_text(value)}`" for name, value in row["fields"].items()]
        return ", ".join(told)

    same = {"nothing": {}, "`border_granularity=mean`": {"border_granularity": "mean"}}
    lines = []
    for text, fields in same.items():
        wanted = {**DEFAULT, **fields}.items()
        (row,) = [row for row in before if wanted <= _whole(row).items()]
        lines.append([text, *_scores(row)])
    lines += [[changed(row), *_scores(row)] for row in rows]
    return markdown(["changed", *(f"seed {seed}" for seed in SEEDS), "mean"], lines)


def finetune_rates(load: Load) -> str:
    """Rates of the whole-network stage, on training images."""
    rows = []
    for row in load("finetune_rates")["rows"]:
        stage = ["", "", "", ""]
        if row["finetune_steps"]:
            rates = f"{row['finetune_lr']:g}", f"{row['finetune_weight_lr']:g}"
            stage = [*rates, row["codes_start_at"], row["augment"]]
        held_out = (
            ["", ""] if row["held_out_kl"] is None else [f"{v:.3f}" for v in row["held_out_kl"]]
        )
        top1 = f"{row['top1_of_6000_training_images']:.2f}"
        rows.append(
            [row["bits"], row["borders"], *stage, *held_out, str(row["best_step"] or ""), top1]
        )
    head = ["bits", "borders", "finetune_lr", "finetune_weight_lr", "codes start at", "augment",
            "held-out KL before", "after", "best step", "top-1 % of training images"]  # fmt: skip
    return markdown(head, rows)


def three_bits(load: Load) -> str:
    """Form and sharing at w3a3, seed 0."""
    lines = []
    for run in load("border_ablation_w3a3")["rows"].values():
        recipe = run["recipe"]
        border = recipe["border"]
        kind = [border, recipe["border_granularity"]] if border else ["none", "-"]
        lines.append([run["preset"], *kind, f"{score(run):.2f}"])
    return markdown(["preset", "border", "border_granularity", "top-1 %"], lines)
