"""The generated tables of accuracy."""

from __future__ import annotations

import functools
import re
import statistics

from table_text import Json, Load, changed, markdown, preset_of, score, spread

PRESETS = ("nearest", "adaround", "brecq", "qdrop", "aquant")
BITS = ("w4a4", "w3a3", "w2a4", "w2a2")


def _resnet20_scores(load: Load, row: str, bits: str) -> list[float]:
    runs = load("resnet20_cifar10_jpeg")
    names = [f"{bits}/{row}".replace("{seed}", f"-s{seed}") for seed in (0, 1, 2)]
    return [score(runs[name]) for name in names if name in runs]


def resnet20(load: Load) -> str:
    """ResNet-20 by preset and bit-width."""
    runs = load("resnet20_cifar10_jpeg")
    older = {"aquant, borders shared across taps, older rates": "aquant-fused{seed}"}
    rows = []
    for label, pattern in {**{name: name + "{seed}" for name in PRESETS}, **older}.items():
        of_row = re.compile(rf"w\da\d/{pattern.replace('{seed}', '-s[0-2]')}$")
        seconds = [run["seconds"] for name, run in runs.items() if of_row.match(name)]
        cells = [spread(_resnet20_scores(load, pattern, bits)) for bits in BITS]
        rows.append([label, *cells, f"{min(seconds):.0f}-{max(seconds):.0f}"])
    again = spread([score(runs["w4a4/qdrop-again-s0"])])
    rows.append(["qdrop, seed 0, code of the aquant row", again, *["not run"] * 3, ""])
    faster = spread([score(runs["w2a2/aquant-s0-lr3e-3"])])
    rows.append(["aquant, seed 0, `border_lr=3e-3`", *["not run"] * 3, faster, ""])
    return markdown(["preset", *BITS, "seconds a run"], rows)


def resnet20_gain(load: Load) -> str:
    """The mean of aquant over that of qdrop, of the seeds that both have."""
    cells, seeds = [], []
    for bits in BITS:
        pair = [_resnet20_scores(load, name + "{seed}", bits) for name in ("aquant", "qdrop")]
        count = min(map(len, pair))
        ours, theirs = (statistics.fmean(scores[:count]) for scores in pair)
        cells.append(f"{ours - theirs:+.2f}")
        seeds.append(str(count))
    return markdown(["", *BITS], [["aquant - qdrop, points", *cells], ["seeds", *seeds]])


def whole_network(load: Load) -> str:
    """ResNet-20 by aquant_plus: what the whole-network stage adds to the run of `resnet20`."""
    rows = []
    for run in load("resnet20_aquant_plus")["runs"]:
        bits = f"w{run['weight_bits']}a{run['act_bits']}"
        stage, seed = run["finetune"], run["seed"]
        aquant = load("resnet20_cifar10_jpeg").get(f"{bits}/aquant-s{seed}")
        before = "not run" if aquant is None else f"{score(aquant):.2f}"
        held_out = f"{stage['start_error']:.3f}", f"{stage['final_error']:.3f}"
        rows.append(
            [bits, str(seed), before, f"{score(run):.2f}", *held_out, str(stage["best_step"]),
             f"{run['seconds']:.0f}", f"{stage['seconds']:.0f}"]
        )  # fmt: skip
    head = ["bits", "seed", "aquant", "aquant_plus", "held-out KL before", "after", "best step",
            "seconds", "of these the stage"]  # fmt: skip
    return markdown(head, rows)


def weights_only(load: Load) -> str:
    """ResNet-20 with float activations, one seed."""
    found = {
        (run["weight_bits"], run["preset"]): run for run in load("resnet20_weights_only")["runs"]
    }
    rows = []
    for bits in sorted({bits for bits, _ in found}):
        pair = [found[bits, preset] for preset in ("nearest", "brecq")]
        seconds = f"{pair[1]['seconds']:.0f}"
        rows.append(
            [
                f"w{bits}a16",
                f"{pair[0]['float']['top1']:.2f}",
                *(f"{score(r):.2f}" for r in pair),
                seconds,
            ]
        )
    return markdown(["bits", "float", "nearest", "brecq", "seconds of brecq"], rows, 1)


def stage_w4a4(load: Load) -> str:
    """ResNet-20 at W4A4, qdrop and aquant with the same whole-network stage."""
    found = {(run["preset"], run["seed"]): run for run in load("resnet20_w4a4_stage")["runs"]}
    seeds = sorted({seed for _, seed in found})
    rows, gains = [], []
    for seed in seeds:
        pair = [found[preset, seed]["quantized"]["top1"] for preset in ("qdrop", "aquant_plus")]
        gains.append(pair[1] - pair[0])
        rows.append([str(seed), *(f"{top1:.2f}" for top1 in pair), f"{gains[-1]:+.2f}"])
    error = statistics.stdev(gains) / len(gains) ** 0.5
    rows.append(["mean", "", "", f"{statistics.mean(gains):+.2f} ± {error:.2f}"])
    return markdown(["seed", "qdrop and the stage", "aquant_plus", "difference"], rows, 1)


def stage_others(load: Load) -> str:
    """One border a channel, and another network, with the whole-network stage."""
    rows = []
    for run in load("resnet_cifar_stage")["runs"]:
        bits = f"w{run['weight_bits']}a{run['act_bits']}"
        scores = f"{run['float']['top1']:.2f}", f"{score(run):.2f}"
        granularity, seconds = run["recipe"]["border_granularity"], f"{run['seconds']:.0f}"
        rows.append([run["network"], granularity, bits, str(run["seed"]), *scores, seconds])
    head = ["network", "a border for each", "bits", "seed", "float", "aquant_plus", "seconds"]
    return markdown(head, rows, 4)


def longer(load: Load) -> str:
    """ResNet-20 at W2A2 with 1,000 and with 5,000 steps a block, seed 0."""
    short, rows, scores = load("resnet20_cifar10_jpeg"), [], {}
    for run in load("resnet20_long")["runs"]:
        pair = scores[run["preset"]] = score(short[f"w2a2/{run['preset']}-s0"]), score(run)
        minutes = f"{run['seconds'] / 60:.0f}"
        rows.append([run["preset"], *(f"{value:.2f}" for value in pair), minutes])
    pairs = zip(scores["aquant"], scores["qdrop"], strict=True)
    gains = (f"{ours - theirs:+.2f}" for ours, theirs in pairs)
    rows.append(["aquant - qdrop, points", *gains, ""])
    return markdown(["preset", "1,000 steps", "5,000 steps", "minutes of 5,000"], rows, 1)


def loops(load: Load) -> str:
    """A recurrent network and a stack, trained by the examples: float, nearest, aquant."""
    rows, presets = [], ("float", "nearest", "aquant")
    for name, metric in (("rnn_digits", "top1"), ("character_stack", "bits_per_character")):
        runs = load(name)["runs"]
        for bits in dict.fromkeys(run["bits"] for run in runs):
            found = [run[metric] for run in runs if run["bits"] == bits]
            scores = ([score[preset] for score in found] for preset in presets)
            label = f"`{name}`, {metric.replace('_', ' ')}"
            rows.append([label, f"w{bits}a{bits}", *map(spread, scores)])
    return markdown(["example, metric", "bits", *presets], rows)


def border_auto(load: Load) -> str:
    """ResNet-20 with borders chosen by block, between qdrop (none) and aquant (all)."""
    rows = []
    for run in load("resnet20_border_auto")["runs"]:
        bits = f"w{run['weight_bits']}a{run['act_bits']}"
        tolerance = run["recipe"]["reconstruction"]["border_tolerance"]
        tried = [block["candidates"] for block in run["blocks"]]
        label, coefficients = run["preset"], 0
        if any(tried):
            label = f"auto, tolerance {tolerance}"
            coefficients = sum(map(functools.partial(_kept, tolerance), tried))
        elif run["recipe"]["border"]:
            coefficients = _all_coefficients(load, bits)
        rows.append((bits, coefficients, label, f"{score(run):.2f}", f"{run['seconds']:.0f}"))
    cells = [[b, label, f"{n:,}", top1, s] for b, n, label, top1, s in sorted(rows)]
    return markdown(["bits", "border", "coefficients", "top-1 %", "seconds"], cells, right=2)


def _kept(tolerance: float, candidates: list[list]) -> int:
    """Coefficients of the candidate that was kept: the last, if it is within the tolerance."""
    (_, dearest, bound), *_ = candidates
    _, coefficients, error = candidates[-1]
    return coefficients if error <= bound * (1 + tolerance) else dearest


def _all_coefficients(load: Load, bits: str) -> int:
    """Coefficients of quadratic borders an element, the reference of every choice."""
    runs = load("resnet20_border_auto")["runs"]
    of_bits = (r for r in runs if f"w{r['weight_bits']}a{r['act_bits']}" == bits)
    blocks = next(run["blocks"] for run in of_bits if any(b["candidates"] for b in run["blocks"]))
    return sum(block["candidates"][0][1] for block in blocks)


def demo(load: Load) -> str:
    """The digits network of ``make demo``."""
    rows = load("demo_digits_w2a2")["rows"]
    line = [f"{row['mean']:.2f}" for row in rows]
    names = [row["preset"] for row in rows]
    return markdown(["float", *names], [[f"{rows[0]['float']:.2f}", *line]], right=0)


def efficientnet(load: Load) -> str:
    """EfficientNet-Lite0 at two bit-widths."""
    eight = load("efficientnet_lite0_w8a8_qdrop")
    runs = [eight, *load("efficientnet_lite0_w4a4")["rows"].values()]
    scores = [f"{eight['float'][name]:.2f}" for name in ("top1", "top5")]
    rows = [["float", "", "", "", *scores, ""]]
    names = ["bits", "preset", "steps", "of the stage: steps, held-out loss", "top-1 %", "top-5 %",
             "minutes"]  # fmt: skip
    for run in runs:
        label, preset, steps, *rest = _imagenet_row(run)
        named = ", ".join([preset, *changed(run)])
        rows.append([label, named, steps, _stage(run), *rest])
    return markdown(names, rows)


def _stage(run: Json) -> str:
    """Steps of the whole-network stage, and the loss on the held-out samples."""
    stage = run.get("finetune")
    if not stage:
        return ""
    return f"{stage['steps']}: {stage['start_error']:.2f} to {stage['final_error']:.2f}"


def efficientnet_larger(load: Load) -> str:
    """EfficientNet-Lite1 and Lite2: float, and each run by its seed."""
    found = load("efficientnet_lite_larger")
    rows = [
        [network, "float", "", "", f"{scores['top1']:.2f}", f"{scores['top5']:.2f}", "", ""]
        for network, scores in found["float"].items()
    ]
    rows += [[r["network"], *_imagenet_row(r), str(r["seed"])] for r in found["runs"]]
    names = ["network", "bits", "preset", "steps", "top-1 %", "top-5 %", "minutes", "seed"]
    return markdown(names, rows)


def _imagenet_row(run: Json) -> list[str]:
    found = run["quantized"]
    label = f"w{run['weight_bits']}a{run['act_bits']}"
    steps = str(run["recipe"].get("reconstruction", run["recipe"])["steps"])
    scores = f"{found['top1']:.2f}", f"{found['top5']:.2f}"
    return [label, run["preset"], steps, *scores, f"{run['seconds'] / 60:.0f}"]


def _stsb_scores(load: Load, bits: str, samples: int, preset: str) -> list[float]:
    start = f"configs/stsb_minilm.py:{bits},"
    runs = [
        run
        for run in load("stsb_minilm")["runs"]
        if run["config"].startswith(start)
        and (run["calibration_samples"], run["preset"]) == (samples, preset)
    ]
    return [score(run) for run in sorted(runs, key=lambda run: run["seed"])]


def stsb(load: Load) -> str:
    """MiniLM on STS-B by bit-width and size of the calibration set."""
    rows = []
    for bits in ("w8a8", "w4a8", "w4a6", "w4a4"):
        for samples in (512, 1024):
            presets = ("nearest", "adaround", "aquant_bert")
            found = [_stsb_scores(load, bits, samples, preset) for preset in presets]
            if any(found):
                rows.append([bits, f"{samples:,}", *map(spread, found)])
    return markdown(["bits", "sentences", "nearest", "adaround", "aquant_bert"], rows)


def stsb_transforms(load: Load) -> str:
    """MiniLM on STS-B with shifted and scaled channels, by the bits of activations and of sums."""
    by: dict[tuple[str, int, str], list[float]] = {}
    for run in sorted(load("stsb_minilm_transforms")["runs"], key=lambda run: run["seed"]):
        sums = [o["act_bits"] for o in run["recipe"]["overrides"] if o["pattern"] == ":sum"]
        bits = f"w{run['weight_bits']}a{run['act_bits']}", *(sums or [run["act_bits"]])
        by.setdefault((*bits, preset_of(run)), []).append(score(run))
    presets = ("nearest", "adaround", "aquant_bert", "aquant_bert and the stage")
    rows = [
        [bits, str(sums), *(spread(by.get((bits, sums, preset), [])) for preset in presets)]
        for bits, sums in sorted({key[:2] for key in by}, reverse=True)
    ]
    return markdown(["bits", "bits of sums", *presets], rows)


def glue(load: Load) -> str:
    """Fine-tuned MiniLM on four tasks."""
    tasks = {"mrpc": load("mrpc_minilm"), **load("glue_minilm")}
    columns = [(bits, name) for bits in ("w4a4", "w4a6") for name in ("adaround", "aquant_bert")]
    rows = []
    for task, found in tasks.items():
        by = {(f"w{r['weight_bits']}a{r['act_bits']}", r["preset"]): r for r in found["runs"]}
        first = found["runs"][0]
        cells = [f"{score(by[column]):.2f}" for column in columns]
        head = [task, first["metric"], f"{first['test_samples']:,}"]
        rows.append([*head, f"{score(first, 'float'):.2f}", *cells])
    names = [f"{bits} {name}" for bits, name in columns]
    return markdown(["task", "metric", "samples", "float", *names], rows)


def glue_transforms(load: Load) -> str:
    """Fine-tuned MiniLM with shifted and scaled channels, of the tasks that were run."""
    presets = ("adaround", "aquant_bert", "aquant_bert and the stage")
    rows = []
    for task, found in load("glue_minilm_transforms")["tasks"].items():
        runs = sorted(found["runs"], key=lambda run: run["seed"])
        cells = [spread([score(r) for r in runs if preset_of(r) == preset]) for preset in presets]
        head = [task, runs[0]["metric"], f"{runs[0]['test_samples']:,}"]
        rows.append([*head, f"{score(runs[0], 'float'):.2f}", *cells])
    return markdown(["task", "metric", "samples", "float", *presets], rows)
