"""Measures how fast images are read and scored.

JPEGs of ImageNet's size (500x375) are made up in a temporary folder. Every round takes: PIL alone
(decode, resize, crop, one image after the other), our reading (the same, normalised and batched,
on all cores), and the score of the network in float and quantized, reading included. Weights are
random: the arithmetic does not depend on them. Ratios are medians of those within one round.

Example:

    python -m launch.bench.throughput --model=resnet18 --preset=aquant --out=throughput.json
"""

import collections
import dataclasses
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import aquant_jax as aq
from aquant_jax import data, models
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line
from launch.lib.metrics import Predict, evaluate_batches

WIDTH, HEIGHT, QUALITY = 500, 375, 90
CALIBRATION = 32


@dataclasses.dataclass(frozen=True)
class Workload:
    """The measured workload; its fields are the flags.

    Attributes:
        model: of the zoo, for ImageNet.
        preset: of the recipe, at 4 bits, without any steps.
        size: side of the square that the network sees.
        images: how many each figure is of.
        batch_size: images a call of the network.
        rounds: how often every figure is taken.
    """

    model: str
    preset: str
    size: int
    images: int
    batch_size: int
    rounds: int


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("model", "resnet18", "in the zoo, for ImageNet", flag_values=values)
    flags.DEFINE_string("preset", "aquant", "of the recipe, at 4 bits", flag_values=values)
    flags.DEFINE_integer("size", 224, "side of the network's input", 1, flag_values=values)
    flags.DEFINE_integer("images", 128, "images per figure", 1, flag_values=values)
    flags.DEFINE_integer("batch_size", 32, "images a call of the network", 1, flag_values=values)
    timing.define_flags(values)


def measure(work: Workload) -> dict[str, Any]:
    """Images a second of each part.

    Args:
        work: what to measure.

    Returns:
        JSON-able.

    Raises:
        InputError: an unknown model or preset.
    """
    preprocessing = data.Preprocessing(size=work.size, resize=work.size * 8 // 7)
    with tempfile.TemporaryDirectory() as folder:
        files = write_images(Path(folder), work.images)
        dataset = data.load(f"folder:{folder}", "/", preprocessing)
        timers = _timers(work, dataset, files, preprocessing)
        # The round before the first also brings the files into memory.
        times = timing.in_turns(timers, work.rounds)
        rates = {name: [work.images / t for t in values] for name, values in times.items()}
        encoded = sum(file.stat().st_size for file in files) / len(files)
    return {
        "benchmark": "throughput",
        **dataclasses.asdict(work),
        "jpeg": f"{WIDTH}x{HEIGHT}, {encoded / 1024:.0f} KiB",
        "images_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "images_per_second_all": rates,
        "read_over_pil": _ratio(rates["read"], rates["pil"]),
        "quantized_over_float": _ratio(rates["quantized"], rates["float"]),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        **environment(),
    }


def write_images(folder: Path, number: int) -> list[Path]:
    """Writes made-up photographs, each of another random scene, into ``folder/val/scene``.

    Args:
        folder: an empty one.
        number: of images.
    """
    from PIL import Image

    (folder / "val" / "scene").mkdir(parents=True)
    rng, files = np.random.default_rng(0), []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        # Grain as of a film brings the files to the 110 KB that ImageNet's have on average.
        pixels = smooth + rng.normal(0, 16, smooth.shape)
        stored = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
            stored, "JPEG", quality=QUALITY
        )
        files.append(folder / "val" / "scene" / f"{index:05d}.jpg")
        files[-1].write_bytes(stored.getvalue())
    return files


def _timers(
    work: Workload, dataset: data.Dataset, files: list[Path], preprocessing: data.Preprocessing
) -> dict[str, Callable[[], float]]:
    apply, variables = models.create(work.model)
    calibration = dataset.test(min(CALIBRATION, work.images)).inputs
    fields = {} if work.preset == "nearest" else {"steps": 0}
    recipe = aq.recipes.preset(work.preset, weight_bits=4, act_bits=4, **fields)
    quantized = aq.quantize(apply, variables, calibration, recipe, observer=aq.Observer())

    return {
        "pil": lambda: _seconds(pil_alone(file, preprocessing) for file in files),
        "read": lambda: _seconds(dataset.batches(work.batch_size)),
        "float": lambda: _scoring(lambda images: apply(variables, images), work, dataset),
        "quantized": lambda: _scoring(quantized, work, dataset),
    }


def _seconds(results: Iterable[object]) -> float:
    start = time.perf_counter()
    collections.deque(results, maxlen=0)
    return time.perf_counter() - start


def _scoring(predict: Predict, work: Workload, dataset: data.Dataset) -> float:
    """Seconds from when the first batch is compiled and running: scoring compiles again."""
    marks: list[float] = []

    def batches() -> Iterator[data.Split]:
        for batch in dataset.batches(work.batch_size):
            yield batch
            marks.append(time.perf_counter())

    evaluate_batches(predict, batches())
    return time.perf_counter() - marks[0]


def pil_alone(file: Path, preprocessing: data.Preprocessing) -> np.ndarray:
    """Decodes, resizes and crops with nothing but PIL, for comparison."""
    from PIL import Image

    with Image.open(file) as image:
        size = preprocessing.size
        scale = preprocessing.resize / min(image.size)
        width, height = (int(n * scale) for n in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _ratio(upper: list[float], lower: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    timing.report(measure(timing.workload(Workload, values)), values.out)


if __name__ == "__main__":
    sys.exit(main())
