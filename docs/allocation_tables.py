"""The generated tables of bits under a budget."""

from __future__ import annotations

import statistics

from table_text import Json, Load, markdown, score, spread

SHOWN = ("layer1_0", "layer1_2", "layer2_2", "layer3_2", "linear")  # blocks
SCORES = (("held_kl_2000", 3), ("test_kl", 3), ("top1", 2))  # and digits


def runs(load: Load) -> str:
    """ResNet-20 by aquant with uniform bits, and with an allocation of the same average."""
    lines = [
        [bits, f"{of[0]['packed_bytes']:,}", spread([score(run) for run in of])]
        for bits, of in _by_bits(load("resnet20_allocation")).items()
    ]
    return markdown(["bits", "bytes", "top-1 %"], lines, right=1)


def stsb(load: Load) -> str:
    """MiniLM on STS-B by aquant_bert with uniform bits, and with allocations."""
    rows = _by_bits(load("stsb_minilm_allocation"))
    lines = [[bits, spread([score(run) for run in of])] for bits, of in rows.items()]
    return markdown(["bits", "Pearson, %"], lines)


def lite0(load: Load) -> str:
    """EfficientNet-Lite0 by aquant with uniform bits, and with an allocation of their average."""
    lines = [
        [bits, *(spread([run["quantized"][name] for run in of]) for name in ("top1", "top5"))]
        for bits, of in _by_bits(load("efficientnet_lite0_allocation")).items()
    ]
    return markdown(["bits", "top-1 %", "top-5 %"], lines)


def _by_bits(measured: Json) -> dict[str, list[Json]]:
    """The runs of each allocation, seed by seed."""
    rows: dict[str, list[Json]] = {}
    for run in measured["runs"]:
        rows.setdefault(run["bits"], []).append(run)
    return rows


def front(load: Load) -> str:
    """The ten allocations of a front, rounded to nearest; see `_front`."""
    return _front(load("resnet20_allocation")["front"])


def front_learned(load: Load) -> str:
    """The ten allocations of a front, learned; see `_front`."""
    return _front(load("resnet20_allocation")["front_learned"])


def _front(measured: Json) -> str:
    """Points, their real degradation, and the rank correlation of both."""
    lines = [
        [
            f"{point['costs']['weight_bits']:.2f}", f"{point['costs']['act_bits']:.2f}",
            f"{point['costs']['bytes']:,.0f}", f"{point['predicted']:.3f}", f"{point['top1']:.2f}",
        ]
        for point in measured["points"]
    ]  # fmt: skip
    head = ["weight bits", "activation bits", "bytes with borders", "predicted KL", "top-1 %"]
    rank = f"Spearman's correlation of predicted KL and lost top-1: {measured['spearman']:.2f}."
    return f"{markdown(head, lines, right=0)}\n\n{rank}"


def learned(load: Load) -> str:
    """How much of what an allocation gains in the first blocks is left at the last, seed 0."""
    measured = load("resnet20_allocation")
    first = [run for run in measured["learned"] if run["seed"] == 0]
    lines = []
    for kind, runs in (("learned", first), ("nearest", measured["nearest"])):
        uniform = next(run for run in runs if run["bits"] == "uniform W3A3")["block_errors"]
        for run in runs:
            shares = [f"{run['block_errors'][block] / uniform[block]:.2f}" for block in SHOWN]
            scores = [f"{run[key]:.{n}f}" if key in run else "not run" for key, n in SCORES]
            lines.append([kind, run["bits"], *shares, *scores])
    head = ["rounding", "bits", *SHOWN, "KL, training images", "KL, test", "top-1 %"]
    return markdown(head, lines, right=2)


def swaps(load: Load) -> str:
    """What a learned network loses or gains with one layer's part of a network of other bits."""
    measured = load("resnet20_allocation")["swaps"]
    parts = {"w": "weights", "a": "step size and border", "wa": "both"}
    lines = []
    for key, part in parts.items():
        cells = []
        for bits in "24":
            kind = " " + "".join(letter + bits for letter in key)
            changes = [
                error - measured["base"]
                for name, error in measured["errors"].items() if name.endswith(kind)
            ]  # fmt: skip
            cells += [f"{sum(c > 0 for c in changes)} of {len(changes)}"]
            cells += [f"{statistics.fmean(changes):+.3f}"]
        lines.append([part, *cells])
    head = ["replaced in one layer", "2 bits: larger KL", "mean", "4 bits: larger KL", "mean"]
    return markdown(head, lines, right=1)


def stages(load: Load) -> str:
    """What 2 bits in one layer of a learned network of 3 bits cost, by the size of its stage."""
    measured = load("resnet20_allocation")["swaps"]
    lines = []
    for stage, sizes in measured["stages"].items():
        cells = []
        for letter, size in sizes.items():
            rise = sum(
                error - measured["base"] for name, error in measured["errors"].items()
                if name.startswith(stage) and name.endswith(f" {letter}2")
            )  # fmt: skip
            cells += [f"{size:,}", f"{rise:.2f}", f"{1e5 * rise / size:.2f}"]
        lines.append([stage, *cells])
    head = ["weights", "rise of KL", "for 100,000", "activations", "rise of KL", "for 100,000"]
    return markdown(["stage", *head], lines, right=1)
