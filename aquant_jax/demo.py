"""Quantizes the embedded digits network by five methods: ``python -m aquant_jax.demo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

import aquant_jax as aq
from aquant_jax import data, models
from aquant_jax.data import Split
from aquant_jax.terminal import show_markdown

PRESETS = ("nearest", "adaround", "brecq", "qdrop", "aquant")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of the accuracy on the 500 held-out digits, a line a method.

    Args:
      arguments: of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m aquant_jax.demo", description=__doc__)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--bits", type=int, choices=range(2, 9), default=2, metavar="2..8")
    parser.add_argument("--steps", type=int, default=250, help="of each block; nearest has none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("seed", 0)):
        if (value := getattr(options, name)) < least:
            parser.error(f"argument --{name}: {value} is less than {least}")

    apply, variables = models.create("digits_cnn", models.DIGITS_WEIGHTS)
    digits = data.load("digits")
    calibration, test = digits.calibration(1024, options.seed).inputs, digits.test()
    compiler = aq.Compiler()
    lines = ["| preset | top-1 % |", "| --- | ---: |"]
    for name in options.presets:
        recipe = aq.recipes.preset(name, weight_bits=options.bits, act_bits=options.bits)
        if name != "nearest":
            recipe = recipe.replace(steps=options.steps)
        quantized = aq.quantize(
            apply, variables, calibration, recipe, seed=options.seed, compiler=compiler
        )
        lines.append(f"| {name} | {_top1(quantized(test.inputs), test):.2f} |")
    lines.append(f"| float | {_top1(apply(variables, test.inputs), test):.2f} |")
    show_markdown("\n".join(lines))


def _top1(logits: object, test: Split) -> float:
    return 100 * float(np.mean(np.asarray(logits).argmax(1) == test.labels))


if __name__ == "__main__":
    main()
