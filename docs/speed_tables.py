"""The generated tables of speed and size."""

from __future__ import annotations

from table_text import Load, markdown


def calibrate(load: Load) -> str:
    """Time of an optimisation step."""
    found = load("calibrate_cpu")
    ms = found["step_ms"]
    names = {
        "float": ("float: forward, backward, update", "", ""),
        "qdrop": ("qdrop", "float", "at most 2.5"),
        "aquant": ("aquant with gpu_ops", "qdrop", "at most 2.5"),
        "aquant_channel": ("aquant, a border a channel", "qdrop", "at most 1.15"),
        "aquant_without_gpu_ops": ("aquant without gpu_ops", "qdrop", "at most 5"),
    }
    rows = [
        [text, f"{ms[name]:.1f}", f"{ms[name] / ms[base]:.2f} of {base}" if base else "", goal]
        for name, (text, base, goal) in names.items()
    ]
    return markdown(["", "ms a step", "ratio", "goal"], rows)


def range_search(load: Load) -> str:
    """Time of the initial step sizes of the whole network."""
    found = load("calibrate_cpu")["scale_search_s"]
    return markdown(["bits", "seconds"], [[b, f"{s:.1f}"] for b, s in found.items()], 1)


def throughput(load: Load) -> str:
    """Images a second."""
    rate = load("throughput_cpu")["images_per_second"]
    names = {
        "pil": "PIL alone, one core",
        "read": "read, decode, preprocess",
        "float": "float evaluation",
        "quantized": "quantized evaluation, reference implementation (aquant, w4a4)",
    }
    return markdown(["", "images a second"], [[t, f"{rate[n]:.1f}"] for n, t in names.items()], 1)


def deploy(load: Load, source: str = "deploy_cpu") -> str:
    """Whole networks by several runtimes, milliseconds a batch."""
    runs = load(source)["runs"]
    names = list(dict.fromkeys(name for run in runs for name in run["ms"]))
    times = [{name: f"{ms['median']:,.1f}" for name, ms in run["ms"].items()} for run in runs]
    rows = [[name, *(found.get(name, "not run") for found in times)] for name in names]
    heads = [
        f"{run['model']} W{run['bits']}A{run['bits']}, batch {run['batch_size']}" for run in runs
    ]
    return markdown(["", *heads], rows, 1)


def stack(load: Load) -> str:
    """A stack of layers, rolled and unrolled."""
    rows = []
    for row in load("stack_cpu")["rows"]:
        cells = [f"{row['layers']}, {row['form']}", f"{row['program']:,}"]
        for name in ("reference", "int8"):
            seconds = row[name]["lower"] + row[name]["compile"]
            cells += [f"{seconds:.2f}", f"{row[name]['ms']['median']:.1f}"]
        rows.append(cells)
    head = ["layers", "program, bytes", "reference: compile, s", "ms", "int8: compile, s", "ms"]
    return markdown(head, rows, 1)


def memory(load: Load) -> str:
    """Peak memory with and without a limit."""
    found = load("memory_resnet50")
    rows = []
    for row in found["rows"]:
        limit = f"{row['limit'] / 2**20:,.0f}" if row["limit"] else "none"
        sizes = (f"{row[name] / 2**20:,.0f}" for name in ("peak", "most_on_disk"))
        rows.append([limit, *sizes, row["sha256"][:8]])
    head = ["limit, MiB", "peak of the process", "caches on disk at most", "SHA-256 of the result"]
    return markdown(head, rows, 0)


def rematerialize(load: Load) -> str:
    """Temporary buffers of a training step, and its time."""
    found = load("memory_resnet50")["rematerialize"]
    forms = ["jnp.clip in to_units", "now", "rematerialize", "in a branch"]
    seconds = found["cpu_seconds_a_step"]
    rows = []
    for name, sizes in found["blocks"].items():
        times = [seconds.get(name, {}).get(form) for form in forms[1:]]
        shown = [f"{time:.2f}" if time else "" for time in times]
        rows.append([name, *(f"{sizes[form]:,}" for form in forms), *shown])
    head = ["block", "before, MiB", "now", "rematerialize", "in a branch"]
    return markdown([*head, "now, CPU s a step", "rematerialize", "in a branch"], rows, 1)


def backends(load: Load) -> str:
    """Quantized networks in float32 and in integers."""
    rows = []
    for net in load("backends_cpu")["networks"]:
        ms = {way: value["median"] for way, value in net["ms_a_batch"].items()}
        same = f"{net['same_class']:,} of {net['images']:,}"
        ratio = f"{net['reference_over_gpu_ops']:.2f}"
        times = [f"{ms['reference']:,.1f}", f"{ms['gpu_ops']:,.1f}", ratio]
        rows.append([f"`{net['config']}`", str(net["batch"]), *times, same])
    head = ["config", "batch", "reference, ms", "int8, ms", "ratio", "same class"]
    return markdown(head, rows)


def columns(load: Load) -> str:
    """The im2col columns alone."""
    ms = load("backends_cpu")["columns"]["ms"]
    names = {
        "gpu_ops": "`gpu_ops.img2col_border`",
        "rows": "jnp, runs of rows",
        "slices": "jnp, slices of the images",
        "patches": "`conv_general_dilated_patches`",
    }
    own = ms["gpu_ops"]["median"]
    rows = [
        [text, f"{ms[name]['median']:.1f}", f"{ms[name]['median'] / own:.1f}"]
        for name, text in names.items()
    ]
    return markdown(["", "ms", "of gpu_ops"], rows, 1)


def latency(load: Load) -> str:
    """ResNet-18's convolutions."""
    found = load("latency_resnet18_cpu")
    names = {
        "im2col fp32": "im2col and matmul, float32",
        "border fp32": "the same with the border",
        "nearest int8": "nearest rounding, int8",
        "border int8": "the border, int8",
        "xla fp32": "XLA's convolution, float32",
        "xla bf16": "XLA's convolution, bfloat16",
    }
    rows = []
    for name, text in names.items():
        pairs = [key.split(" over ") for key in found["overhead_percent"]]
        bases = [base for top, base in pairs if top == name]
        ratios = [
            f"{found['overhead_percent'][f'{name} over {base}']:+.1f}% of {base}" for base in bases
        ]
        rows.append([text, f"{found['total_ms'][name]:,.0f}", "; ".join(ratios)])
    rows.append(["tuned kernel, int8 tensor cores", "not run", "needs an NVIDIA GPU"])
    return markdown(["", "ms", "against"], rows)


def size(load: Load) -> str:
    """Bytes of saved networks."""
    rows = []
    for row in load("size")["rows"]:
        share = 100 * row["borders"] / (row["payload"] - row["borders"])
        names = [row["model"], f"{row['weight_bits']} bits", row["border_format"]]
        counts = [row[name] for name in ("float", "bits", "payload")]
        rest = [row[name] for name in ("container", "program")]
        line = [*(f"{count:,.0f}" for count in counts), f"{share:.1f}%"]
        rows.append([*names, *line, *(f"{count:,}" for count in rest)])
    head = ["network", "weights", "coefficients", "float", "sum of bits", "payload", "borders"]
    return markdown([*head, "container", "program"], rows, right=3)
