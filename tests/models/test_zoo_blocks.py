"""The automatic blocks of every network of the zoo are the paper's: residual or inverted residual
blocks, and single layers for stem and head."""

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import models

BASIC = ("conv1", "conv2")
BOTTLENECK = ("conv1", "conv2", "conv3")
SEPARABLE = ("depthwise", "project")
INVERTED = ("expand", "depthwise", "project")


def single(*names):
    return [f"{name}: {name}/kernel" for name in names]


def stages(depths, layers, first=None):
    """The blocks of all stages; `first`: stage -> the layers of its first block."""
    blocks = []
    for stage, depth in enumerate(depths, 1):
        for index in range(depth):
            block = f"stage{stage}_{index}"
            inside = (first or {}).get(stage, layers) if index == 0 else layers
            blocks.append(f"{block}: " + ", ".join(f"{block}/{layer}/kernel" for layer in inside))
    return blocks


def residual(depths, layers, projected):
    """Stem, blocks (those that change the shape with a conv on the shortcut), head."""
    first = dict.fromkeys(projected, (*layers, "shortcut"))
    return [*single("stem"), *stages(depths, layers, first), *single("head")]


BLOCKS = {
    "resnet18": residual((2, 2, 2, 2), BASIC, (2, 3, 4)),
    "resnet50": residual((3, 4, 6, 3), BOTTLENECK, (1, 2, 3, 4)),
    "regnetx_600mf": residual((1, 3, 5, 7), BOTTLENECK, (1, 2, 3, 4)),
    "regnetx_3200mf": residual((2, 6, 15, 2), BOTTLENECK, (1, 2, 3, 4)),
    "mobilenetv2": [
        *single("stem"),
        *stages((1, 2, 3, 4, 3, 3, 1), INVERTED, {1: SEPARABLE}),
        *single("last", "head"),
    ],
    "mnasnet2": [
        *single("stem", "depthwise", "pointwise"),
        *stages((3, 3, 3, 2, 4, 1), INVERTED),
        *single("last", "head"),
    ],
    "efficientnet_lite0": [
        *single("stem"),
        *stages((1, 2, 2, 3, 3, 4, 1), INVERTED, {1: SEPARABLE}),
        *single("last", "head"),
    ],
    **{
        f"efficientnet_lite{number}": [
            *single("stem"),
            *stages((1, 3, 3, 4, 4, 5, 1), INVERTED, {1: SEPARABLE}),
            *single("last", "head"),
        ]
        for number in (1, 2)
    },
    **{
        f"resnet{depth}_cifar": [
            *single("conv1"),
            *(
                program.replace("stage", "layer")
                for program in stages([(depth - 2) // 6] * 3, BASIC)
            ),
            *single("linear"),
        ]
        for depth in (20, 32, 44, 56)
    },
    "digits_cnn": [
        *single("stem"),
        "block1: block1/conv1/kernel, block1/conv2/kernel",
        "block2: block2/conv1/kernel, block2/conv2/kernel, block2/shortcut/kernel",
        "block3: block3/conv1/kernel, block3/conv2/kernel",
        *single("head"),
    ],
}
COUNTS = {
    "resnet18": 10, "resnet50": 18, "regnetx_600mf": 18, "regnetx_3200mf": 27, "mobilenetv2": 20,
    "mnasnet2": 21, "efficientnet_lite0": 19, "efficientnet_lite1": 24, "efficientnet_lite2": 24,
    "resnet20_cifar": 11, "resnet32_cifar": 17, "resnet44_cifar": 23, "resnet56_cifar": 29,
    "digits_cnn": 5,
}  # fmt: skip
SIZES = dict.fromkeys(BLOCKS, (32, 32, 3)) | {"digits_cnn": (8, 8, 1)}


def prepare(name, shape):
    apply, variables = models.create(name)
    recipe = aq.recipes.aquant(batch_size=1)
    return aq.prepare(apply, variables, np.zeros((2, *shape), np.float32), recipe)


def blocks_of(net):
    """Lines of the description: its blocks with their layers in the order of their names."""
    lines = aq.describe(net).replace("params/", "").splitlines()[1:-2]
    found = []
    for line in lines:
        name, layers = line.split(maxsplit=1)[1].split(": ")
        found.append(f"{name}: {', '.join(sorted(layers.split(', ')))}")
    return found


# Their siblings have the same code. tests/models counts the parameters and layers of all.
SLOW = (
    "efficientnet_lite0", "efficientnet_lite2", "regnetx_3200mf",
    "resnet32_cifar", "resnet44_cifar", "resnet56_cifar",
)  # fmt: skip


def in_order(program):
    name, layers = program.split(": ")
    return f"{name}: {', '.join(sorted(layers.split(', ')))}"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in sorted(models.MODELS)
    ],
)
def test_blocks_are_those_of_the_paper(name):
    assert blocks_of(prepare(name, SIZES[name])) == [in_order(block) for block in BLOCKS[name]]
    assert len(BLOCKS[name]) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        # The stem ends behind its ReLU and before the max pooling.
        ("resnet18", {"stem": (32, 64), "stage1_1": (16, 64), "stage4_1": (2, 512)}),
        # An inverted residual ends behind its linear projection or its addition.
        ("mobilenetv2", {"stem": (32, 32), "stage2_0": (16, 24), "stage2_1": (16, 24)}),
        ("regnetx_600mf", {"stem": (32, 32), "stage1_0": (16, 48)}),
    ],
)
def test_the_values_that_a_block_passes_on(name, ends):
    net = prepare(name, (64, 64, 3))
    found = {block.name.removeprefix("params/"): block.end for block in net.blocks}
    producers = net.graph.producers()
    for program, (side, channels) in ends.items():
        (value,) = found[program]
        assert net.graph.avals[value].shape == (1, side, side, channels)
        linear = name == "mobilenetv2" and program != "stem"
        assert (producers[value].name in ("add", "conv_general_dilated")) == linear
