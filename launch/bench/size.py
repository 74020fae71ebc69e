"""Measures bytes on disk of what aq.save writes, for ResNet-20 and EfficientNet-Lite0 at W4 and W2.

Weights are random and nothing is trained, because bytes do not depend on them. Borders are
quadratic, one per tap. "bits" is the sum over weight codes, scales, zero points, step sizes,
coefficients and biases, counted from the shapes; "payload" the bytes that these take in the file;
"container" the other files without the program; "program" the network as compressed StableHLO.

Example:

    python -m launch.bench.size --out=size.json
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import aquant_jax as aq
from aquant_jax import models
from aquant_jax.arithmetic import packing
from aquant_jax.deployment import checkpoint
from aquant_jax.deployment.quantized import Quantized
from aquant_jax.storage import archive
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import command_line

NETWORKS = {"resnet20_cifar": 32, "efficientnet_lite0": 224}  # model -> image size
WEIGHT_BITS = (4, 2)
COEFFICIENT_BITS = {"float32": 32, "float16": 16, "int8": 8}
SAMPLES = 4


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    timing.define_out(values)


def measure() -> dict[str, Any]:
    """Sizes of every network at every number of bits and format of the coefficients."""
    rows = []
    for model, side in NETWORKS.items():
        apply, variables = models.create(model)
        compiler = aq.Compiler()  # shared: formats change no program
        images = np.random.default_rng(0).normal(size=(SAMPLES, side, side, 3)).astype(np.float32)
        for bits in WEIGHT_BITS:
            for border_format in packing.FORMATS:
                recipe = aq.recipes.aquant(
                    bits, 4, steps=0, batch_size=SAMPLES, border_format=border_format
                )
                network = aq.quantize(
                    apply, variables, images, recipe, observer=aq.Observer(), compiler=compiler
                )
                rows.append({"model": model, "weight_bits": bits} | measure_one(network))
    return {"benchmark": "size", "rows": rows, "table": table(rows), **environment()}


def measure_one(network: Quantized) -> dict[str, Any]:
    """Sizes of one network, in bytes."""
    sizes = checkpoint.sizes(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        aq.save(network, path)
        files = archive.sizes(path)
        payload = archive.read_payload(path).nbytes
    program = files[checkpoint.PROGRAM]
    return {
        "border_format": network.recipe.border_format,
        "float": sizes.floating,
        "bits": count_bits(network) / 8,
        "payload": payload,
        "borders": sizes.borders,
        "container": sum(files.values()) - payload - program,
        "program": program,
    }


def count_bits(network: Quantized) -> int:
    """The bits of the deployed state, from shapes and recipe alone."""
    total = 0
    for spec in network.specs:
        layer = network.layers[spec.path]
        bits = spec.weight_bits
        total += layer.codes.size * (bits or 32) + layer.scale.size * (32 + (bits or 0))
        total += 32 * layer.bias.size
        coefficients = sum(values.size for values in layer.border.values())
        total += COEFFICIENT_BITS[network.recipe.border_format] * coefficients
    total += sum(32 + 8 for _ in network.activations)
    return total + sum(8 * values.nbytes for values in network.constants.values())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| network | weights | coefficients | float | sum of bits | payload | above the bits |"
        " borders | container | program |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        above = 100 * (row["payload"] / row["bits"] - 1)
        share = 100 * row["borders"] / (row["payload"] - row["borders"])
        lines.append(
            f"| {row['model']} | {row['weight_bits']} bits | {row['border_format']} "
            f"| {row['float']:,} | {row['bits']:,.0f} | {row['payload']:,} | {above:.3f}% "
            f"| {share:.1f}% | {row['container']:,} | {row['program']:,} |"
        )
    return "\n".join(lines)


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    timing.report(measure(), values.out)


if __name__ == "__main__":
    sys.exit(main())
