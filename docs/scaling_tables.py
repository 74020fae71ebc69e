"""The generated tables of scaling.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from table_text import Load, markdown

MEASURED = ("resnet20", "vit", "decoder")  # docs/measurements/scaling_NAME.json
NAMES = {
    "resnet20_cifar": "ResNet-20",
    "small_vit": "small ViT",
    "small_decoder": "small decoder",
}
SHARES = {
    "compute": "multiply", "memory": "memory", "links": "links", "latency": "latency",
    "overhead": "launches", "host": "host",
}  # fmt: skip


def work(load: Load) -> str:
    """Operations, memory and CPU time of the steps, predicted and measured."""
    rows = [
        [
            *_head(check),
            *(_pair(check, name, 1e6) for name in ("flops", "bytes_accessed", "temporary")),
            *(_pair(check, name, 1e-3) for name in ("cpu", "seconds")),
        ]
        for check in load("scaling_model")["checks"]
    ]
    head = ["network", "mesh", "MFLOP", "memory read and written, MB", "held, MB", "CPU, ms"]
    return markdown([*head, "time, ms"], rows)


def communication(load: Load) -> str:
    """Operands of the collectives of the steps, predicted and measured."""
    rows = [
        [*_head(check), *(_exact(check, name) for name in ("reduced", "gathered", "permuted"))]
        for check in load("scaling_model")["checks"]
        if check["mesh"] != "1"
    ]
    return markdown(["network", "mesh", "all-reduce", "all-gather", "collective-permute"], rows)


def hand_over(load: Load) -> str:
    """Hand-over and range search of whole networks."""
    rows = []
    for name in MEASURED:
        run = load(f"scaling_{name}")
        for row in run["rows"]:
            blocks = row["blocks"]
            sent = [_sent(block["forward"], block["write"]) for block in blocks if block["write"]]
            spent = (
                sum(block["blocks"] * block[f"{part}_seconds"] for block in blocks)
                for part in ("hand_over", "rest")
            )
            sizes = f"{sum(sent) / 1e6:,.2f}" if any(sent) else "0"
            rows.append([NAMES[run["model"]], row["mesh"], sizes, *(f"{s:.1f}" for s in spent)])
    return markdown(["network", "mesh", "sent a batch, MB", "hand-overs, s", "rest, s"], rows)


def networks(load: Load) -> str:
    """Counts of the networks that are predicted."""
    rows = [
        [
            name, str(found["blocks"]), f"{found['weights'] / 1e6:,.1f}",
            *(f"{found[part] / 1e9:,.2f}" for part in ("forward", "backward", "values")),
        ]
        for name, found in load("scaling_model")["networks"].items()
    ]  # fmt: skip
    head = ["network", "blocks", "weights, millions", "forward, 10^9", "backward, 10^9"]
    return markdown([*head, "values, 10^9"], rows)


def device(load: Load) -> str:
    """The figures of a GPU, and where they come from."""
    maker, assumed = "the maker's", "assumed"
    origins = {
        "flops": ("multiplications in TF32, TFLOP/s", 1e12, maker),
        "bandwidth": ("memory, TB/s", 1e12, maker),
        "memory": ("memory, GB", 1e9, maker),
        "node": ("GPUs a node", 1, maker),
        "fast_link": ("NVLink, GB/s and direction", 1e9, maker),
        "host_link": ("PCIe, GB/s and direction", 1e9, maker),
        "slow_link": ("between nodes, GB/s a GPU: a port of 400 Gb/s", 1e9, assumed),
        "latency": ("of a collective, for every doubling of devices, µs", 1e-6, assumed),
        "overhead": ("launches of a step, ms", 1e-3, assumed),
        "host_overhead": ("a call where caches are on the host, ms", 1e-3, assumed),
        "flops_share": ("share of the peak of multiplications", 1, assumed),
        "bandwidth_share": ("share of the peak of memory", 1, assumed),
        "search": ("elements a second of the range search, millions", 1e6, "measured on this CPU"),
    }  # fmt: skip
    found = load("scaling_model")["gpu"]
    rows = [
        [text, f"{found[name] / unit:,.4g}", origin]
        for name, (text, unit, origin) in origins.items()
    ]
    return markdown(["", "figure", "origin"], rows, 9)


def predictions(load: Load) -> str:
    """Time, memory and bytes of the networks on many devices."""
    rows = []
    for row in load("scaling_model")["predictions"]:
        shares = sorted(row["shares"].items(), key=lambda item: -item[1])[:2]
        parts = ", ".join(f"{SHARES[name]} {100 * share:.0f}%" for name, share in shares)
        accumulate = f" / {row['accumulate']}" if row["accumulate"] > 1 else ""
        rows.append([
            row["network"], str(row["devices"]), row["way"], row["mesh"],
            f"{row['batch']}{accumulate}", f"{row['steps']:,}", _hours(row["hours"]),
            f"{row['step_seconds'] * 1e3:,.1f}", parts, f"{row['memory'] / 1e9:.1f}",
            f"{row['sent_a_step'] / 1e6:,.0f}", f"{row['sent'] / 1e12:,.1f}",
        ])  # fmt: skip
    head = ["network", "devices", "split", "mesh", "batch", "steps", "hours", "step, ms"]
    return markdown([*head, "most of it", "memory, GB", "sent a step, MB", "sent, TB"], rows, 6)


def _head(check: Mapping[str, Any]) -> list[str]:
    return [NAMES[check["model"]], check["mesh"]]


def _pair(check: Mapping[str, Any], name: str, unit: float) -> str:
    """Predicted and measured, and their ratio."""
    ours, theirs = (check[kind][name] / unit for kind in ("predicted", "measured"))
    digits = 1 if max(ours, theirs) < 100 else 0
    return f"{ours:,.{digits}f} / {theirs:,.{digits}f} ({ours / theirs:.2f})"


def _exact(check: Mapping[str, Any], name: str) -> str:
    """Predicted and measured bytes."""
    return " / ".join(f"{check[kind].get(name, 0):,.0f}" for kind in ("predicted", "measured"))


def _sent(forward: Mapping[str, Any] | None, write: Mapping[str, Any]) -> float:
    """Bytes of the operands of a hand-over's collectives."""
    kinds: Sequence[Mapping[str, Any]] = [write, forward["collectives"] if forward else {}]
    return sum(sent["bytes"] for found in kinds for sent in found.values())


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
