"""Writes the tables of README.md and docs/*.md from docs/measurements/*.json.

    python docs/results_tables.py            # rewrites every generated table
    python docs/results_tables.py --check    # exits 1 and names a table that is out of date

A table stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``. Only the standard library
is needed. `tables` and `rewrite` read the measurements and write nothing.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where the neighbours are imported from

import ablation_tables
import accuracy_tables
import allocation_tables
import models_table
import scaling_tables
import speed_tables
from table_text import Load, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/results.md", "docs/lab_log.md", "docs/scaling.md", "docs/models.md")
MARKED = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BUILDERS: dict[str, Callable[[Load], str]] = {
    "headline": models_table.headline,
    "demo": accuracy_tables.demo,
    "whole-network": accuracy_tables.whole_network,
    "weights-only": accuracy_tables.weights_only,
    "stage-w4a4": accuracy_tables.stage_w4a4,
    "stage-others": accuracy_tables.stage_others,
    "resnet20-long": accuracy_tables.longer,
    "loops": accuracy_tables.loops,
    "border-auto": accuracy_tables.border_auto,
    "allocation": allocation_tables.runs,
    "allocation-front": allocation_tables.front,
    "allocation-stsb": allocation_tables.stsb,
    "allocation-lite0": allocation_tables.lite0,
    "allocation-front-learned": allocation_tables.front_learned,
    "models": models_table.models,
    "model-sizes": models_table.sizes,
    "model-times": models_table.times,
    "allocation-learned": allocation_tables.learned,
    "allocation-swaps": allocation_tables.swaps,
    "allocation-stages": allocation_tables.stages,
    "resnet20": accuracy_tables.resnet20,
    "resnet20-gain": accuracy_tables.resnet20_gain,
    "efficientnet-lite0": accuracy_tables.efficientnet,
    "efficientnet-larger": accuracy_tables.efficientnet_larger,
    "stsb": accuracy_tables.stsb,
    "stsb-transforms": accuracy_tables.stsb_transforms,
    "glue": accuracy_tables.glue,
    "glue-transforms": accuracy_tables.glue_transforms,
    "calibrate": speed_tables.calibrate,
    "range-search": speed_tables.range_search,
    "throughput": speed_tables.throughput,
    "columns": speed_tables.columns,
    "deploy": speed_tables.deploy,
    "deploy-amx": functools.partial(speed_tables.deploy, source="deploy_amx_cpu"),
    "stack": speed_tables.stack,
    "memory": speed_tables.memory,
    "rematerialize": speed_tables.rematerialize,
    "backends": speed_tables.backends,
    "latency": speed_tables.latency,
    "size": speed_tables.size,
    "ablation-first": ablation_tables.first,
    "ablation-second": ablation_tables.second,
    "ablation-default": ablation_tables.default,
    "finetune-rates": ablation_tables.finetune_rates,
    "ablation-w3a3": ablation_tables.three_bits,
    "scaling-work": scaling_tables.work,
    "scaling-communication": scaling_tables.communication,
    "scaling-hand-over": scaling_tables.hand_over,
    "scaling-networks": scaling_tables.networks,
    "scaling-device": scaling_tables.device,
    "scaling-predictions": scaling_tables.predictions,
}


def tables() -> dict[str, str]:
    """Every generated table in Markdown, by name."""
    once = functools.cache(load)
    return {name: build(once) for name, build in BUILDERS.items()}


def rewrite(text: str, tables: Mapping[str, str]) -> str:
    """The text with every marked table replaced by the one of that name.

    Raises:
        KeyError: the text marks a table that does not exist.
    """
    return MARKED.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}", text)


def outdated(text: str, tables: Mapping[str, str]) -> list[str]:
    """Names of the marked tables that are not what `tables` has."""
    return [found[2] for found in MARKED.finditer(text) if rewrite(found[0], tables) != found[0]]


def main(arguments: list[str]) -> int:
    """Rewrites the pages, or with ``--check`` says which table is out of date."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/results_tables.py [--check]", file=sys.stderr)
        return 2
    current = tables()
    for page in PAGES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        if not arguments:
            path.write_text(rewrite(text, current), encoding="utf-8")
        elif names := outdated(text, current):
            print(f"{page}: table {names[0]} differs from docs/measurements", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
