"""``launch.bench.calibrate``: its figures, with steps one by one and in a scanned loop."""

import json
import statistics

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import models
from aquant_jax.reconstruction import optimize
from launch.bench import calibrate
from tests.support.nets import images, small_net


def test_the_block_is_the_first_with_a_residual_sum():
    apply, variables = models.create("resnet20_cifar")
    x = np.zeros((2, 32, 32, 3), np.float32)
    net = aq.prepare(apply, variables, x, aq.recipes.nearest(batch_size=2))
    assert net.blocks[calibrate.BLOCK].name == "params/layer1_0"


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [1, 2], ids=["one by one", "scanned"])
def test_steps_are_timed(monkeypatch, tmp_path, capsys, scanned):
    monkeypatch.setattr(models, "create", lambda name: small_net())
    monkeypatch.setattr(optimize, "steps_a_call", lambda: scanned)
    monkeypatch.setattr(optimize, "LOG_EVERY", 1)
    monkeypatch.setattr(calibrate, "range_search", lambda *arguments: 1.5)
    monkeypatch.setattr(calibrate, "BATCH", 2)
    monkeypatch.setattr(calibrate, "SAMPLES", 2)
    borders, step = [], calibrate._quantized_step
    monkeypatch.setattr(
        calibrate, "_quantized_step",
        lambda net, backend: borders.append(net.recipe.border_granularity) or step(net, backend),
    )  # fmt: skip
    out = tmp_path / "calibrate.json"
    assert calibrate.main(["calibrate", "--rounds=3", f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    assert report == json.loads(capsys.readouterr().out)
    assert set(report["step_ms"]) == {
        "float", "qdrop", "aquant", "aquant_channel", "aquant_without_gpu_ops",
    }  # fmt: skip
    assert borders[1:] == ["element", "channel", "element"]  # qdrop has none
    for name, median in report["step_ms"].items():
        every = report["step_ms_all"][name]
        assert (len(every), statistics.median(every)) == (3, median)
        assert min(every) > 0
    ms = report["step_ms"]
    assert report["qdrop_over_float"] == pytest.approx(ms["qdrop"] / ms["float"])
    assert report["aquant_over_qdrop"] == pytest.approx(ms["aquant"] / ms["qdrop"])
    assert report["channel_over_qdrop"] == pytest.approx(ms["aquant_channel"] / ms["qdrop"])
    assert report["scale_search_s"] == {"w2a2": 1.5, "w4a4": 1.5}
    assert report["block"].startswith("block_1")
    assert report["block_input"] == [[2, 32, 32, 4]]


def test_the_search_covers_every_weight_and_activation(monkeypatch):
    monkeypatch.setattr(calibrate, "SAMPLES", 8)
    searched = {"weights": 0, "activations": 0}

    def counted(name, function):
        def call(*arguments):
            found = function(*arguments)
            searched[name] += len(found)
            return found

        return call

    for name, function in (
        ("weights", "make_weight_quantizers"), ("activations", "observe_ranges")
    ):  # fmt: skip
        monkeypatch.setattr(calibrate, function, counted(name, getattr(calibrate, function)))
    apply, variables = small_net()
    assert calibrate.range_search(apply, variables, images(0, 8), 4) > 0
    # Four layers; the image is not quantized. Activations are searched twice, once for the timer.
    assert searched == {"weights": 4, "activations": 2 * 3}


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--model=vgg"], "unknown model 'vgg'"),
        (["--rounds=0"], "rounds"),
        (["--images=3"], "images"),
    ],
)
def test_bad_input_is_one_line(argv, word, capsys):
    assert calibrate.main(["calibrate", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert word in error
