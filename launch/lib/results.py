"""The results of a run in one line of text."""

from pathlib import Path
from typing import Any

from aquant_jax.reporting.run import bits_of, metric_name
from aquant_jax.storage.parsing import malformed
from launch.lib.run_directory import RESULTS


def one_line(results: dict[str, Any], workdir: Path) -> str:
    """The results of a run in words.

    Raises:
        InputError: those that its workdir holds are damaged.
    """
    with malformed(workdir / RESULTS):
        metric = results["metric"]
        return (
            f"{results['preset']} {bits_of(results)} "
            f"seed {results['seed']}: {results['quantized'][metric]:.2f}% {metric_name(metric)} "
            f"(float {results['float'][metric]:.2f}%) of {results['test_samples']} samples, "
            f"{results['seconds']:.0f} s on {results['device']}"
        )
