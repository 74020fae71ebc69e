"""The throughput benchmark, on a few images and one dense layer."""

import json

import numpy as np
import pytest
from PIL import Image

from aquant_jax import models
from launch.bench import calibrate, throughput

pytestmark = pytest.mark.user_model
SMALL = ["--size=14", "--images=6", "--batch_size=4", "--rounds=3", "--preset=nearest"]


def test_rates_and_their_ratios(monkeypatch, tmp_path, capsys):
    weights = np.random.default_rng(0).normal(size=(14 * 14 * 3, 4)).astype(np.float32)
    network = (lambda weights, x: x.reshape(len(x), -1) @ weights, weights)
    monkeypatch.setattr(models, "create", lambda name: network)
    out = tmp_path / "out.json"
    assert calibrate.main(["bench", "throughput", *SMALL, f"--out={out}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    rates = found["images_per_second_all"]
    assert set(rates) == {"pil", "read", "float", "quantized"}
    assert all(len(values) == 3 and min(values) > 0 for values in rates.values())
    for name, values in rates.items():
        assert found["images_per_second"][name] == sorted(values)[1]
    ratios = sorted(a / b for a, b in zip(rates["read"], rates["pil"], strict=True))
    assert found["read_over_pil"] == ratios[1]
    assert found["cores"] >= 1
    assert "numpy" in found["versions"]


def test_images_are_as_large_as_those_of_imagenet(tmp_path):
    files = throughput.write_images(tmp_path, 3)
    for file in files:
        with Image.open(file) as image:
            assert image.size == (500, 375)
        assert 90_000 < file.stat().st_size < 130_000


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["throughput", "--model=vgg"], "resnet18"),
        (["throughput", "--images=0"], "images"),
        (["speed"], "throughput"),
        ([], "throughput"),
    ],
)
def test_bad_input_is_one_line(argv, word, capsys):
    assert calibrate.main(["bench", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
