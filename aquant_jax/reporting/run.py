"""What a report shows of a run, as plain data: the fields of its results.json, and more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from aquant_jax.deployment.checkpoint import sizes
from aquant_jax.deployment.quantized import Quantized

Report = Mapping[str, Any]  # fields of a block's report
THIS = "this"  # the name of the point of a Pareto front that a run was made of


class Run(NamedTuple):
    """A run in a report.

    Attributes:
      name: of the run in tables and legends.
      results: `describe` of its network; and, where they are known, ``metric``, ``float`` and
        ``quantized`` (scores by metric), ``seed``, ``config``, ``command``, ``device``,
        ``versions``, ``test_samples``, ``peak_bytes`` and ``pareto``, a list of points: ``cost``,
        ``name`` (`THIS` for the run itself), ``predicted`` and ``measured`` degradation (or None),
        with ``pareto_cost``, what the cost is, and ``pareto_loss``, what the degradation is; and
        ``allocation``, by layer its ``layer``, ``choice``, ``error`` and ``bytes``, with its
        ``average_bits`` of weights and activations.
      curves: the loss curve ``[k, 2]`` of every block, by its index.
      layers: see `layers.layer_records`.
      link: the address of its own report, or None.
      group: the name that it shares with its other seeds; None if it stands alone.
    """

    name: str
    results: Mapping[str, Any]
    curves: Mapping[int, Any]
    layers: Sequence[Mapping[str, Any]] = ()
    link: str | None = None
    group: str | None = None

    @property
    def label(self) -> str:
        """Its name in figures."""
        return self.group or self.name

    @property
    def score(self) -> float | None:
        """In its metric."""
        return self._score("quantized")

    @property
    def float_score(self) -> float | None:
        """Of the float network."""
        return self._score("float")

    @property
    def lost(self) -> float | None:
        """By quantization."""
        if self.score is None or self.float_score is None:
            return None
        return self.float_score - self.score

    def _score(self, which: str) -> float | None:
        metric = self.results.get("metric")
        return self.results[which][metric] if metric else None

    @property
    def bits(self) -> str:
        """Such as ``w4a4``."""
        return bits_of(self.results)


def describe(quantized: Quantized) -> dict[str, Any]:
    """Recipe, bytes and reports, of the blocks without their loss curves."""
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
        "bytes": sizes(quantized)._asdict(),
        "blocks": blocks,
        "finetune": stages[0] if stages else None,
    }


def split_reports(reports: Sequence[Report]) -> tuple[list[Report], list[Report]]:
    """The fields of the reports of blocks, and those of the whole-network stage, if it ran."""
    blocks = [report for report in reports if "held_out_curve" not in report]
    return blocks, [report for report in reports if "held_out_curve" in report]


def bits_of(results: Mapping[str, Any]) -> str:
    """The bit-width of a run; of one that an allocation gave its bits, the averages.

    >>> bits_of({"weight_bits": 3, "act_bits": 3, "average_bits": [2.5, 3.0]})
    'w2.5a3 on average'
    """
    if (average := results.get("average_bits")) is None:
        return bit_width(results["weight_bits"], results["act_bits"])
    weights, acts = average
    return f"w{weights:.3g}a{acts or 16:.3g} on average"


def bit_width(weight_bits: int, act_bits: int | None) -> str:
    """The name of a bit-width; 16 stands for activations that are not quantized.

    >>> bit_width(4, 4), bit_width(4, None)
    ('w4a4', 'w4a16')
    """
    return f"w{weight_bits}a{act_bits or 16}"


METRIC_NAMES = {"top1": "top-1"}  # others are called by their names


def metric_name(metric: str) -> str:
    """How a metric is called in text.

    >>> metric_name("top1"), metric_name("f1")
    ('top-1', 'f1')
    """
    return METRIC_NAMES.get(metric, metric)
