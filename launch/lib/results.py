"""The results of a run: the part that describes its recipe and blocks, and one line of text."""

from collections.abc import Mapping, Sequence
from typing import Any

import aquant_jax as aq

Report = Mapping[str, Any]  # fields of a block's report
METRIC_NAMES = {"top1": "top-1"}  # others are called by their names


def describe(quantized: aq.Quantized) -> dict[str, Any]:
    """Recipe and reports, of the blocks without their loss curves, which are in the log."""
    recipe = quantized.recipe
    reports = [report._asdict() for report in quantized.reports]
    blocks, stages = split_reports(reports)
    blocks = [
        {name: value for name, value in block.items() if name != "loss_curve"} for block in blocks
    ]
    return {
        "preset": recipe.preset,
        "weight_bits": recipe.weight_bits,
        "act_bits": recipe.act_bits,
        "recipe": recipe.to_dict(),
        "seconds": sum(report.seconds for report in quantized.reports),
        "blocks": blocks,
        "finetune": stages[0] if stages else None,
    }


def split_reports(reports: Sequence[Report]) -> tuple[list[Report], list[Report]]:
    """The fields of the reports of blocks, and those of the whole-network stage, if it ran."""
    blocks = [report for report in reports if "held_out_curve" not in report]
    return blocks, [report for report in reports if "held_out_curve" in report]


def bit_width(weight_bits: int, act_bits: int | None) -> str:
    """The name of a bit-width; 16 stands for activations that are not quantized.

    >>> bit_width(4, 4), bit_width(4, None)
    ('w4a4', 'w4a16')
    """
    return f"w{weight_bits}a{act_bits or 16}"


def metric_name(metric: str) -> str:
    """How a metric is called in text.

    >>> metric_name("top1"), metric_name("f1")
    ('top-1', 'f1')
    """
    return METRIC_NAMES.get(metric, metric)


def one_line(results: dict[str, Any]) -> str:
    """The results of a run in words."""
    metric = results["metric"]
    return (
        f"{results['preset']} {bit_width(results['weight_bits'], results['act_bits'])} "
        f"seed {results['seed']}: {results['quantized'][metric]:.2f}% {metric_name(metric)} "
        f"(float {results['float'][metric]:.2f}%) of {results['test_samples']} samples, "
        f"{results['seconds']:.0f} s on {results['device']}"
    )
