import contextlib
import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import models
from aquant_jax.arithmetic import border
from launch import overhead

NAMES = ["efficientnet_lite0", "resnet18", "mobilenetv2"]


@pytest.fixture(scope="module")
def printed():
    """The text that the program prints, of three networks."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert overhead.main(["overhead", f"--models={','.join(NAMES)}"]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def table(printed):
    """Cells of the printed table, by network."""
    cnns, _, _ = printed.partition("\nSizes:")
    lines = [line for line in cnns.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, rule, *body = rows
    assert all(len(row) == len(header) == len(rule) for row in body)
    return {row[0]: dict(zip(header, row, strict=True)) for row in body}


def test_the_networks_are_those_of_the_flag_in_its_order(table):
    assert list(table) == NAMES


def test_by_default_the_papers_networks_stand_first(monkeypatch):
    """In a text that is tables on a terminal."""
    shown = []
    monkeypatch.setattr(overhead, "show_markdown", shown.append)
    monkeypatch.setattr(overhead, "count_layers", lambda name: [])
    monkeypatch.setattr(overhead, "row", lambda name, layers: f"| {name} |")
    monkeypatch.setattr(overhead, "granularity_lines", lambda name, layers: [])
    monkeypatch.setattr(overhead, "bert_lines", list)
    assert overhead.main(["overhead"]) == 0
    printed = [line.strip("| ") for line in shown[0].splitlines()]
    names = [name for name in printed if name in models.LINEN]
    assert names[:6] == list(overhead.PAPER)
    assert sorted(names) == sorted(models.LINEN)


def test_an_unknown_network_is_one_line(capsys):
    assert overhead.main(["overhead", "--models=resnet18,resnet19"]) == 2
    assert "error: --models has 'resnet19'; there are " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "paper", "count"),
    [
        ("resnet18", "0.81%", "three an element, all layers but the first (0.809)"),
        (
            "mobilenetv2",
            "4.56%",
            "two an element of depthwise convs, three of other layers, all layers but the first "
            "(4.560)",
        ),
        ("efficientnet_lite0", "-", "-"),
    ],
)
def test_the_papers_numbers_are_explained(table, name, paper, count):
    assert table[name]["paper"] == paper
    assert table[name]["the paper's count"] == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet50", 0.644), ("regnetx_600mf", 2.824), ("regnetx_3200mf", 2.147),
        ("mnasnet2", 8.269),
    ],
)  # fmt: skip
def test_the_papers_other_numbers_are_three_an_element(name, found):
    text = overhead.explanation(overhead.count_layers(name), overhead.PAPER[name])
    assert text == f"three an element, all layers but the first ({found})"


def test_counts_of_resnet18_by_hand(table):
    """Column elements: taps times input channels, of every conv and of the head."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    elements, weights = 7 * 7 * 3, 7 * 7 * 3 * 64
    for inputs, width, stride in stages:
        sources = [inputs, width, width, width]
        elements += 9 * sum(sources) + (inputs if stride == 2 else 0)
        weights += 9 * sum(sources) * width + (inputs * width if stride == 2 else 0)
    elements, weights = elements + 512, weights + 512 * 1000
    cells = table["resnet18"]
    assert cells["weights"] == f"{weights:,}" == "11,678,912"
    assert cells["column elements"] == f"{elements:,}"
    assert cells["quadratic, all layers"].split()[0] == f"{3 * elements:,}"
    # 16-bit coefficients beside 4-bit weights: four times the ratio.
    assert cells["4-bit weights"] == "5.57 -> 5.75 MiB (+3.3%)"
    assert cells["8-bit weights"] == "11.14 -> 11.32 MiB (+1.6%)"


def test_granularities_of_one_layer_by_hand():
    """A strided 3x3 convolution of four channels, 8x6 to 4x3 pixels, with quadratic borders."""
    layer = overhead.LayerCounts(9 * 4 * 5, 9, 4, False, terms=3, inputs=8 * 6 * 4, pixels=12)
    counts = {g: (layer.coefficients(g), layer.operations(g)) for g in border.GRANULARITIES}
    columns = 12 * 9 * 4
    assert counts == {
        "element": (3 * 9 * 4, 4 * columns),
        "mean": (3 * 9 * 4, 5 * columns),  # eight additions and a product of nine taps
        "channel": (3 * 4, 4 * 8 * 6 * 4),
    }
    assert layer._replace(terms=0).operations("mean") == 0
    pointwise = layer._replace(taps=1)
    assert pointwise.operations("mean") == pointwise.operations("element")


def test_granularities_of_resnet18(printed):
    """The first, whose input is float, has no border; each image has 4 operations an input."""
    found = {}
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "resnet18" and cells[1] in border.GRANULARITIES:
            found[cells[1]] = cells[2:]
    channels = 4 * 64 + (64 + 3 * 128 + 64) + (128 + 3 * 256 + 128) + (256 + 3 * 512 + 256) + 512
    assert found["channel"][:2] == [f"{3 * channels:,}", f"{6 * channels:,}"]
    assert found["element"][:2] == found["mean"][:2] == ["94,464", "188,928"]
    shares = {name: float(cells[-1].removesuffix("%")) for name, cells in found.items()}
    assert shares["channel"] < shares["element"] < shares["mean"] < 2


def test_depthwise_elements_are_per_tap_and_channel():
    layers = overhead.count_layers("mobilenetv2")
    assert [(x.taps, x.channels, x.depthwise) for x in layers[:3]] == [
        (9, 3, False), (9, 32, True), (1, 32, False),
    ]  # fmt: skip
    assert sum(layer.depthwise for layer in layers) == 17
    assert not any(layer.depthwise for layer in overhead.count_layers("regnetx_600mf"))


def test_a_number_that_nothing_explains_says_so():
    layers = overhead.count_layers("resnet20_cifar")
    text = overhead.explanation(layers, 5.0)
    assert text.startswith("none of ours; the nearest is two an element, all layers (4.25")


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(4, (3, 1), feature_group_count=4, name="depthwise")(x))
        return nn.Dense(2, name="head")(jnp.mean(x, axis=(1, 2)))


@pytest.mark.parametrize(("granularity", "taps"), [("element", 3), ("channel", 1)])
def test_what_is_counted_is_what_a_quantized_network_holds(monkeypatch, granularity, taps):
    monkeypatch.setitem(models.LINEN, "tiny", (Tiny, ()))
    apply, shapes = models.abstract("tiny")
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), shapes)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    recipe = aq.recipes.aquant(steps=0, batch_size=4, border_granularity=granularity)
    quantized = aq.quantize(apply, variables, images, recipe, observer=aq.Observer())
    counted = {x.taps: x.coefficients(granularity) for x in overhead.count_layers("tiny")}
    held = {
        path.split("/")[1]: sum(leaf.size for leaf in jax.tree.leaves(layer.border))
        for path, layer in quantized.layers.items()
    }
    assert held == {"stem": counted[9], "depthwise": counted[3], "head": counted[1]}
    assert held == {"stem": 0, "depthwise": 3 * taps * 4, "head": 3 * 4}


def test_bert_base_from_its_shapes(printed):
    """Twelve layers of four 768 x 768 and two 768 x 3072 matrices; three coefficients an input."""
    (row,) = [line for line in printed.splitlines() if line.startswith("| BERT-base")]
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072)
    coefficients = 12 * 3 * (5 * 768 + 3072)
    embeddings = (30_522 + 512 + 2) * 768
    for count in (weights, coefficients, embeddings):
        assert f"| {count:,} |" in row
    bits = 16 * coefficients / (4 * weights + 8 * embeddings)
    assert f"| +{100 * bits:.3f}% | 0.75% |" in row
    assert f"{100 * bits:.2f}" == "0.75"  # the paper's number
