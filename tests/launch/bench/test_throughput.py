"""The throughput benchmark, on a few images and one dense layer."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from aquant_jax import models
from launch.bench import throughput

SMALL = ["--size=14", "--images=6", "--batch_size=4", "--rounds=3", "--preset=nearest"]


@pytest.fixture
def one_layer(monkeypatch):
    """In place of every network."""
    weights = np.random.default_rng(0).normal(size=(14 * 14 * 3, 4)).astype(np.float32)
    network = (lambda weights, x: x.reshape(len(x), -1) @ weights, weights)
    for name in models.MODELS:
        monkeypatch.setitem(models.MODELS, name, lambda *_: network)


def test_rates_and_their_ratios(one_layer, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert throughput.main(["throughput", *SMALL, f"--out={out}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(out.read_text())
    rates = report["images_per_second_all"]
    assert set(rates) == {"pil", "read", "float", "quantized"}
    assert all(len(values) == 3 and min(values) > 0 for values in rates.values())
    for name, values in rates.items():
        assert report["images_per_second"][name] == sorted(values)[1]
    ratios = sorted(a / b for a, b in zip(rates["read"], rates["pil"], strict=True))
    assert report["read_over_pil"] == ratios[1]
    ratios = sorted(a / b for a, b in zip(rates["quantized"], rates["float"], strict=True))
    assert report["quantized_over_float"] == ratios[1]
    assert report["cores"] == len(os.sched_getaffinity(0))
    assert report["versions"]["numpy"] == np.__version__


def test_images_are_as_large_as_those_of_imagenet(tmp_path):
    files = throughput.write_images(tmp_path, 3)
    for file in files:
        with Image.open(file) as image:
            assert image.size == (500, 375)
        assert 90_000 < file.stat().st_size < 130_000


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--model=vgg"], "resnet18"),
        (["--images=0"], "images"),
        (["--preset=best"], "unknown preset 'best'"),
        (["calibrate"], "unexpected argument 'calibrate'"),
    ],
)
def test_bad_input_is_one_line(argv, word, one_layer, capsys):
    assert throughput.main(["throughput", *SMALL, *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
