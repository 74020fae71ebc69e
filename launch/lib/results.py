"""The results of a run: the part that describes its recipe and blocks, and one line of text."""

from typing import Any

import aquant_jax as aq

METRIC_NAMES = {"top1": "top-1"}  # others are called by their names


def describe(quantized: aq.Quantized) -> dict[str, Any]:
    """Recipe and block reports, without their loss curves, which are in the log."""
    recipe = quantized.recipe
    blocks = [report._asdict() for report in quantized.reports]
    for block in blocks:
        del block["loss_curve"]
    return {
        "preset": recipe.preset,
        "weight_bits": recipe.weight_bits,
        "act_bits": recipe.act_bits,
        "recipe": recipe.to_dict(),
        "seconds": sum(report.seconds for report in quantized.reports),
        "blocks": blocks,
    }


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
        f"{results['preset']} w{results['weight_bits']}a{results['act_bits']} "
        f"seed {results['seed']}: {results['quantized'][metric]:.2f}% {metric_name(metric)} "
        f"(float {results['float'][metric]:.2f}%) of {results['test_samples']} samples, "
        f"{results['seconds']:.0f} s on {results['device']}"
    )
