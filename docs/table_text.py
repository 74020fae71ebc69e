"""What the generated tables share: measurements under today's names, and Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent / "measurements"
# A measurement keeps the field names of the version that wrote it: old name -> name of today.
RENAMED = {
    "unit": "granularity",
    "settle": "final_full_quant_fraction",
    "drop": "quant_drop_prob",
    "kept_start": "fell_back_to_nearest",
    "calibration_images": "calibration_samples",
    "test_images": "test_samples",
    "definition": "reference",
    "definition_over_gpu_ops": "reference_over_gpu_ops",
}

Json = dict[str, Any]
Load = Callable[[str], Any]


def modernise(value: Any) -> Any:
    """A measurement under today's field names, with the two parts of a recipe in one dict."""
    if isinstance(value, list):
        return [modernise(item) for item in value]
    if not isinstance(value, dict):
        return value
    fields = dict(_field(key, item) for key, item in value.items())
    part = fields.get("reconstruction")
    return {**fields, **part} if isinstance(part, dict) else fields


def _field(name: str, value: Any) -> tuple[str, Any]:
    if name in ("fused", "shared_across_taps"):
        return "border_granularity", "mean" if value else "element"
    return RENAMED.get(name, name), modernise(value)


def load(name: str) -> Any:
    """The measurement ``docs/measurements/NAME.json``."""
    text = (MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8")
    return modernise(json.loads(text))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 99) -> str:
    """A Markdown table; columns from number `right` on are aligned to the right."""
    line = ["---:" if column >= right else "---" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, line, *rows))


def spread(scores: Sequence[float], each: bool = True) -> str:
    """One score, or mean and standard deviation of several; ``not run`` without any."""
    if not scores:
        return "not run"
    if len(scores) == 1:
        return f"{scores[0]:.2f}"
    text = f"{statistics.fmean(scores):.2f} ± {statistics.stdev(scores):.2f}"
    return f"{text} ({', '.join(f'{score:.2f}' for score in scores)})" if each else text


def score(run: Json, part: str = "quantized") -> float:
    """The metric of one run, in percent."""
    return run[part][run.get("metric", "top1")]


def preset_of(run: Json) -> str:
    """The preset of a run, and the whole-network stage where it is not the preset's own."""
    stage = run.get("finetune") and run["preset"] != "aquant_plus"
    return f"{run['preset']} and the stage" if stage else run["preset"]


def changed(run: Json) -> list[str]:
    """What differs from the config of a network's images: channel transforms, augmentation."""
    return [*run["recipe"].get("transforms", ()), *filter(None, [run.get("augment")])]
