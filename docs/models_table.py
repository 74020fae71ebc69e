"""Every network with what was measured of it here: the tables of models.md, and the headline."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from table_text import Json, Load, changed, markdown, preset_of, score, spread

CIFAR, IMAGENET = "CIFAR-10 (JPEG), top-1", "1,300 images of ImageNet, top-1"
# Networks of the zoo, and BERT's family, by the names of `models.MODELS`: label, data, config.
NETWORKS: dict[str, tuple[str, str, str]] = {
    "digits_cnn": ("digits CNN", "digits, top-1", "digits"),
    "resnet20_cifar": ("ResNet-20", CIFAR, "cifar10_resnet20"),
    "resnet32_cifar": ("ResNet-32", CIFAR, "cifar10_resnet20"),
    "resnet44_cifar": ("ResNet-44", CIFAR, "cifar10_resnet20"),
    "resnet56_cifar": ("ResNet-56", CIFAR, "cifar10_resnet20"),
    "efficientnet_lite0": ("EfficientNet-Lite0", IMAGENET, "efficientnet_lite0"),
    "efficientnet_lite1": ("EfficientNet-Lite1", IMAGENET, "efficientnet_lite1"),
    "efficientnet_lite2": ("EfficientNet-Lite2", IMAGENET, "efficientnet_lite2"),
    "resnet18": ("ResNet-18", "ImageNet, top-1", "resnet18"),
    "resnet50": ("ResNet-50", "ImageNet, top-1", "resnet50"),
    "mobilenetv2": ("MobileNetV2", "ImageNet, top-1", "mobilenetv2"),
    "mnasnet2": ("MNASNet 2.0", "ImageNet, top-1", "mnasnet2"),
    "regnetx_600mf": ("RegNetX-600MF", "ImageNet, top-1", "regnetx_600mf"),
    "regnetx_3200mf": ("RegNetX-3.2GF", "ImageNet, top-1", "regnetx_3200mf"),
    "minilm_stsb": ("MiniLM-L6", "STS-B, Pearson of cosines", "stsb_minilm"),
    "minilm_cola": ("MiniLM-L6", "GLUE, CoLA, Matthews", "glue_bert"),
    "minilm_mrpc": ("MiniLM-L6", "GLUE, MRPC, F1", "glue_bert"),
    "minilm_rte": ("MiniLM-L6", "GLUE, RTE, accuracy", "glue_bert"),
    "minilm_sst2": ("MiniLM-L6", "GLUE, SST-2, accuracy", "glue_bert"),
    "bert_base": ("BERT-base", "GLUE, other tasks", "glue_bert"),
}

# Rows of the headline: a network, its bits, and what its runs have besides a preset.
HEADLINE = (
    ("digits_cnn", "w2a2", ""),
    *(("resnet20_cifar", bits, "") for bits in ("w2a2", "w2a4", "w3a3", "w4a4")),
    ("efficientnet_lite0", "w4a4", ""),
    ("efficientnet_lite1", "w4a4", ""),
    ("minilm_stsb", "w4a4", ", sums 8 bits"),
    ("minilm_stsb", "w4a4", ", shift_scale, sums 8 bits"),
    ("minilm_stsb", "w4a4", ", shift_scale"),
)
PRESETS = ("nearest", "adaround", "brecq", "qdrop", "aquant", "aquant_plus")
BERT_PRESETS = {"aquant": "aquant_bert", "aquant_plus": "aquant_bert and the stage"}

ZOO_NAMES = {label: name for name, (label, _, _) in NETWORKS.items()}  # of a measurement's label


class Run(NamedTuple):
    """One seed of a network: how it was quantized, and its scores in percent."""

    network: str
    bits: str
    how: str
    score: float
    float_score: float
    minutes: float


def models(load: Load) -> str:
    """Every network, a line a bit-width, with the way of quantizing whose mean is best."""
    by = _runs_by_network(load)
    known = {name: f"{value:.2f}" for name, value in _float_only(load).items()}
    tables: dict[str, list[list[str]]] = {}
    for network, (label, data, config) in NETWORKS.items():
        rows = tables.setdefault(data, [])
        found = sorted((bits for name, bits in by if name == network), reverse=True)
        for bits in found:
            how, runs = max(by[network, bits].items(), key=lambda item: _mean(item[1]))
            scores = spread([run.score for run in runs], each=False)
            minutes = statistics.fmean(run.minutes for run in runs)
            shown = f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.2g}"
            figures = [f"{runs[0].float_score:.2f}", scores, how, str(len(runs)), shown]
            rows.append([label, bits, *figures, f"`{config}`"])
        if not found:
            base = known.get(network, "not run")
            rows.append([label, "", base, "not run", "", "", "", f"`{config}`"])
    head = ["network", "bits", "float", "quantized", "preset", "seeds", "minutes a seed", "config"]
    return "\n\n".join(f"### {data}\n\n{markdown(head, rows)}" for data, rows in tables.items())


def headline(load: Load) -> str:
    """Scores by preset; mean and standard deviation where there is more than one seed."""
    by, rows = _runs_by_network(load), []
    for network, bits, suffix in HEADLINE:
        found, (label, data, _) = by[network, bits], NETWORKS[network]
        names = BERT_PRESETS if label == "MiniLM-L6" else {}
        scores = [
            [run.score for run in found.get(names.get(preset, preset) + suffix, ())]
            for preset in PRESETS
        ]
        base = next(iter(found.values()))[0].float_score
        cells = [spread(each, each=False) for each in scores]
        rows.append([label, data + suffix, bits, f"{base:.2f}", *cells])
    return markdown(["network", "data, metric", "bits", "float", *PRESETS], rows)


def sizes(load: Load) -> str:
    """Bytes of the weights, quantized parameters and borders."""
    rows = []
    measured = load("size")["rows"]
    for (model, bits), group in itertools.groupby(
        measured, key=lambda row: (row["model"], row["weight_bits"])
    ):
        of = {row["border_format"]: row for row in group}
        base = of["float32"]["float"]
        cells = (f"{row['payload']:,} ({base / row['payload']:.1f}x)" for row in of.values())
        rows.append([NETWORKS[model][0], f"w{bits}", f"{base:,}", *cells])
    formats = [row["border_format"] for row in measured[:3]]
    head = ["network", "weights", "bytes of float32", *(f"borders in {name}" for name in formats)]
    return markdown(head, rows, 2)


def times(load: Load) -> str:
    """Milliseconds a batch of whole networks on a CPU, float and ours."""
    rows = []
    for run in load("deploy_cpu")["runs"]:
        ways = ("xla float32", "ours nearest", "ours channel", "ours element")
        base, *ours = (run["ms"][way]["median"] for way in ways)
        label, bits = NETWORKS[run["model"]][0], f"w{run['bits']}a{run['bits']}"
        cells = (f"{ms:.1f} ({base / ms:.1f}x)" for ms in ours)
        rows.append([label, bits, str(run["batch_size"]), f"{base:.1f}", *cells])
    head = ["network", "bits", "batch", "XLA float32, ms", "nearest", "border a channel",
            "border an element"]  # fmt: skip
    return markdown(head, rows, 2)


def _mean(runs: list[Run]) -> float:
    return statistics.fmean(run.score for run in runs)


def _bits(run: Json) -> str:
    acts = run["act_bits"]
    return f"w{run['weight_bits']}a{16 if acts is None else acts}"


def _run(network: str, run: Json, how: str) -> Run:
    return Run(network, _bits(run), how, score(run), score(run, "float"), run["seconds"] / 60)


def _runs_by_network(load: Load) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """The seeds of every network and bit-width, by how it was quantized."""
    by: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in _runs(load):
        by.setdefault((run.network, run.bits), {}).setdefault(run.how, []).append(run)
    return by


def _runs(load: Load) -> Iterator[Run]:
    """All measured runs that changed nothing but the preset, its stage and its granularity."""
    for row in load("demo_digits_w2a2")["rows"]:
        minutes = row["seconds"] / 60
        yield Run("digits_cnn", "w2a2", row["preset"], row["mean"], row["float"], minutes)
    for name, run in load("resnet20_cifar10_jpeg").items():
        if name == f"{_bits(run)}/{run['preset']}-s{run['seed']}":
            yield _run("resnet20_cifar", run, run["preset"])
    for name in ("resnet20_aquant_plus", "resnet20_w4a4_stage", "resnet20_weights_only"):
        for run in load(name)["runs"]:
            yield _run("resnet20_cifar", run, preset_of(run))
    for run in load("resnet_cifar_stage")["runs"]:
        granularity = run["recipe"]["border_granularity"]
        suffix = ", channel" if granularity == "channel" else ""
        yield _run(ZOO_NAMES[run["network"]], run, run["preset"] + suffix)
    tried = [run for run in load("efficientnet_lite0_w4a4")["rows"].values() if not changed(run)]
    lite = {run["preset"]: run for run in sorted(tried, key=_held_out, reverse=True)}
    for run in (load("efficientnet_lite0_w8a8_qdrop"), *lite.values()):
        yield _run("efficientnet_lite0", run, run["preset"])
    for run in load("efficientnet_lite_larger")["runs"]:
        yield _run(ZOO_NAMES[run["network"]], run, run["preset"])
    yield from _sentences(load)


def _held_out(run: Json) -> float:
    """The loss on the held-out samples, by which one of several runs of a preset is chosen."""
    return run["finetune"]["final_error"] if run.get("finetune") else 0.0


def _sentences(load: Load) -> Iterator[Run]:
    """MiniLM: 1,024 sentences; residual sums at 8 bits where an override says so."""
    for name, transforms in (("stsb_minilm", ""), ("stsb_minilm_transforms", ", shift_scale")):
        for run in load(name)["runs"]:
            if run["calibration_samples"] == 1024:
                sums = ", sums 8 bits" if run["recipe"]["overrides"] else ""
                yield _run("minilm_stsb", run, preset_of(run) + transforms + sums)
    for task, found in {"mrpc": load("mrpc_minilm"), **load("glue_minilm")}.items():
        for run in found["runs"]:
            yield _run(f"minilm_{task}", run, run["preset"])


def _float_only(load: Load) -> dict[str, float]:
    """Float scores of networks that were not quantized here."""
    found = load("efficientnet_lite_larger")["float"]
    return {ZOO_NAMES[label]: scores["top1"] for label, scores in found.items()}
