"""The results of a run in one line of text."""

from typing import Any

from aquant_jax.reporting.run import bit_width, metric_name


def one_line(results: dict[str, Any]) -> str:
    """The results of a run in words."""
    metric = results["metric"]
    return (
        f"{results['preset']} {bit_width(results['weight_bits'], results['act_bits'])} "
        f"seed {results['seed']}: {results['quantized'][metric]:.2f}% {metric_name(metric)} "
        f"(float {results['float'][metric]:.2f}%) of {results['test_samples']} samples, "
        f"{results['seconds']:.0f} s on {results['device']}"
    )
