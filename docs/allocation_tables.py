"""The generated tables of bits under a budget."""

from __future__ import annotations

from table_text import Json, Load, markdown, score, spread


def runs(load: Load) -> str:
    """ResNet-20 by aquant with uniform bits, and with an allocation of the same average."""
    rows: dict[str, list[Json]] = {}
    for run in load("resnet20_allocation")["runs"]:
        rows.setdefault(run["bits"], []).append(run)
    lines = [
        [bits, f"{of[0]['packed_bytes']:,}", spread([score(run) for run in of])]
        for bits, of in rows.items()
    ]
    return markdown(["bits", "bytes", "top-1 %"], lines, right=1)


def front(load: Load) -> str:
    """The ten allocations of a front, their real degradation, and the rank correlation of both."""
    measured = load("resnet20_allocation")["front"]
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
