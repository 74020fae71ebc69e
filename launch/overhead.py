"""Prints what the borders add to each network, beside the paper's Sec. 4.3, as Markdown tables.

Nothing is loaded or run: the counts come from the shapes of the traced networks. A column element
is one (tap, input channel) of a conv's im2col row, or one input of a dense layer. The second table
has the three values of ``border_granularity``. BERT-base, the paper's Table 2, stands below.

Example:

    python -m launch.overhead
    python -m launch.overhead --models=resnet18,mobilenetv2
"""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from aquant_jax import models, recipes
from aquant_jax.arithmetic import border
from aquant_jax.errors import InputError
from aquant_jax.graph.trace import trace
from aquant_jax.layers.fake_quant import border_shape
from aquant_jax.models import bert
from aquant_jax.plan.assign import make_plan
from aquant_jax.terminal import show_markdown
from launch.lib import command_line

PAPER = {
    "resnet18": 0.81,
    "resnet50": 0.64,
    "regnetx_600mf": 2.82,
    "regnetx_3200mf": 2.14,
    "mobilenetv2": 4.56,
    "mnasnet2": 8.27,
}
LAST_DIGIT = 0.01  # in percent: the paper both rounds and truncates
COEFFICIENT_BITS = 16
BERT_PAPER = 0.75
ENCODER_BITS, EMBEDDING_BITS = 4, 8  # of what the paper calls a model
HEADER = (
    "| network | weights | column elements | quadratic, all layers | paper | the paper's count |"
    " 4-bit weights | 8-bit weights | preset aquant stores |"
)

GRANULARITY_HEADER = (
    "| network | border_granularity | coefficients | bytes | operations of borders, an image |"
    " of the layers' operations |"
)


class LayerCounts(NamedTuple):
    """Counts of one weighted op.

    Attributes:
        weights: elements of its weight.
        taps, channels: of one column.
        depthwise: whether it is a depthwise convolution.
        terms: coefficients of a border of the aquant preset; none where the input stays float.
        inputs: elements of its activation, for one image.
        pixels: columns of one image.
    """

    weights: int
    taps: int
    channels: int
    depthwise: bool
    terms: int
    inputs: int
    pixels: int

    @property
    def elements(self) -> int:
        return self.taps * self.channels

    def coefficients(self, granularity: str) -> int:
        """The coefficients that are stored."""
        return self.terms * (self.channels if granularity == "channel" else self.elements)

    def operations(self, granularity: str) -> int:
        """Additions and products of the borders of one image, those of the mean included."""
        if not self.terms:
            return 0
        borders = self.inputs if granularity == "channel" else self.elements * self.pixels
        averaged = granularity == "mean" and self.taps > 1
        return (2 * (self.terms - 1) + averaged) * borders


# Counts that the paper may have made, the plainest first: coefficients of a layer, and layers.
RULES: dict[str, Callable[[LayerCounts], int]] = {
    "three an element": lambda layer: 3 * layer.elements,
    "two an element": lambda layer: 2 * layer.elements,
    "two an element of depthwise convs, three of other layers": lambda layer: (
        (2 if layer.depthwise else 3) * layer.elements
    ),
    "three a channel": lambda layer: 3 * layer.channels,
    "two a channel": lambda layer: 2 * layer.channels,
}
SCOPES = {
    "all layers but the first": slice(1, None),  # the image is not quantized
    "all layers": slice(None),
    "neither first nor last": slice(1, -1),
}


def count_layers(name: str) -> list[LayerCounts]:
    """The weighted ops of a model of the zoo, in order."""
    apply, variables = models.abstract(name)
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    return _count(apply, variables, x, recipes.preset("aquant"))


def count_bert(config: bert.BertConfig) -> tuple[list[LayerCounts], int]:
    """The weighted ops of an encoder with its classifier, and the elements of its embeddings."""
    model = bert.Bert(config, labels=2)
    variables = bert.abstract(model)
    x = dict.fromkeys(bert.INPUTS, jax.ShapeDtypeStruct((1, 8), np.int32))
    everywhere = dict.fromkeys(("first_weight_bits", "last_weight_bits", "last_act_bits"))
    head = {"pattern": "classifier", "keep_float": True}
    recipe = recipes.preset("aquant_bert", overrides=(head,), **everywhere)
    tables = jax.tree_util.tree_leaves_with_path(variables)
    embeddings = sum(
        int(np.prod(leaf.shape)) for path, leaf in tables if path[-1].key == "embedding"
    )
    return _count(model.apply, variables, x, recipe), embeddings


def _count(
    apply: models.Apply, variables: Any, x: Any, recipe: recipes.Recipe
) -> list[LayerCounts]:
    graph = trace(apply, variables, x)
    specs = make_plan(graph, recipe).layers
    layers = []
    for op in graph.ops:
        if op.layer is None:
            continue
        x, y = (graph.avals[value].shape for value in (op.x, op.outputs[0]))
        taps, channels = border_shape(op, "element", x)
        groups = op.params.get("feature_group_count", 1)
        name = specs[op.layer.path].border
        outer = math.prod(op.layer.weight_shape[axis] for axis in op.layer.channel_axes)
        layers.append(
            LayerCounts(
                weights=math.prod(op.layer.weight_shape),
                taps=taps,
                channels=channels,
                depthwise=1 < groups == channels,
                terms=len(border.get(name).powers) if name else 0,
                inputs=math.prod(x),
                pixels=math.prod(y) // outer,
            )
        )
    return layers


def explanation(layers: list[LayerCounts], paper: float) -> str:
    """The first count that gives the paper's percentage, or that none does."""
    weights = sum(layer.weights for layer in layers)
    percent = {
        f"{rule}, {scope}": 100 * sum(map(RULES[rule], layers[SCOPES[scope]])) / weights
        for rule, scope in itertools.product(RULES, SCOPES)
    }
    for name, value in percent.items():
        if abs(value - paper) < LAST_DIGIT:
            return f"{name} ({value:.3f})"
    nearest = min(percent, key=lambda name: abs(percent[name] - paper))
    return f"none of ours; the nearest is {nearest} ({percent[nearest]:.3f})"


def row(name: str, layers: list[LayerCounts]) -> str:
    """The model's line of the table."""
    weights = sum(layer.weights for layer in layers)
    coefficients = sum(map(RULES["three an element"], layers))
    stored = sum(layer.coefficients("element") for layer in layers)
    paper = PAPER.get(name)
    cells = [
        name,
        f"{weights:,}",
        f"{sum(layer.elements for layer in layers):,}",
        f"{coefficients:,} ({100 * coefficients / weights:.2f}%)",
        "-" if paper is None else f"{paper}%",
        "-" if paper is None else explanation(layers, paper),
        *(_size(weights, bits, coefficients) for bits in (4, 8)),
        f"{stored:,} ({100 * stored / weights:.2f}%)",
    ]
    return f"| {' | '.join(cells)} |"


def granularity_lines(name: str, layers: list[LayerCounts]) -> list[str]:
    """The model's lines of the second table."""
    lines = []
    products = sum(layer.weights * layer.pixels for layer in layers)
    for granularity in border.GRANULARITIES:
        coefficients = sum(layer.coefficients(granularity) for layer in layers)
        operations = sum(layer.operations(granularity) for layer in layers)
        cells = [
            name,
            granularity,
            f"{coefficients:,}",
            f"{coefficients * COEFFICIENT_BITS // 8:,}",
            f"{operations:,}",
            f"{100 * operations / (2 * products):.2f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bert_lines() -> list[str]:
    """The cost of the borders in BERT-base, beside the paper's 0.75%."""
    layers, embeddings = count_bert(bert.BertConfig())
    encoder = layers[:-2]  # without pooler and classifier
    weights = sum(layer.weights for layer in encoder)
    stored = sum(layer.coefficients("element") for layer in encoder)
    size = weights * ENCODER_BITS + embeddings * EMBEDDING_BITS
    percent = 100 * stored * COEFFICIENT_BITS / size
    return [
        "| network | encoder's weights | embeddings | coefficients | of the weights' count |"
        f" of the size at {ENCODER_BITS} and {EMBEDDING_BITS} bits | paper |",
        "| --- " + "| ---: " * 6 + "|",
        f"| BERT-base | {weights:,} | {embeddings:,} | {stored:,} | {100 * stored / weights:.2f}% "
        f"| +{percent:.3f}% | {BERT_PAPER}% |",
    ]


def _size(weights: int, bits: int, coefficients: int) -> str:
    before, added = weights * bits, coefficients * COEFFICIENT_BITS
    mib = 8 * 2**20
    return f"{before / mib:.2f} -> {(before + added) / mib:.2f} MiB (+{100 * added / before:.1f}%)"


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    text = "networks of the zoo; none: all of them, the paper's first"
    flags.DEFINE_list("models", "", text, flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Prints the tables of the networks, in the order of the flag."""
    values, _ = command_line.parse(argv, define_flags, __doc__)
    names = values.models or [*PAPER, *(name for name in models.LINEN if name not in PAPER)]
    if unknown := [name for name in names if name not in models.LINEN]:
        raise InputError(f"--models has {unknown[0]!r}; there are {', '.join(models.LINEN)}")
    counts = {name: count_layers(name) for name in names}
    lines = [HEADER, "| --- " + "| ---: " * (HEADER.count("|") - 2) + "|"]
    lines += [row(name, layers) for name, layers in counts.items()]
    lines += [
        "",
        f"Sizes: all weights at that many bits, quadratic borders in all layers at "
        f"{COEFFICIENT_BITS} bits a coefficient; biases and step sizes left out.",
        "",
        GRANULARITY_HEADER,
        "| --- | --- " + "| ---: " * (GRANULARITY_HEADER.count("|") - 3) + "|",
    ]
    for name, layers in counts.items():
        lines += granularity_lines(name, layers)
    show_markdown("\n".join([*lines, "", *bert_lines()]))


if __name__ == "__main__":
    sys.exit(main())
