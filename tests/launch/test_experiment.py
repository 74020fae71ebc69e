"""Data as a config names it: what it is scored on, calibrated on, and what is left out."""

import json
import re
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import aquant_jax as aq
from aquant_jax import data, models
from launch import quantize
from launch.lib import command_line, experiment, run_directory
from tests.data.test_folder import picture


@pytest.fixture
def root(tmp_path):
    """Two folders of ten classes, like CIFAR's: ``pets`` to score on, ``more`` to calibrate on."""
    for name, split, number in (("pets", "val", 2), ("more", "train", 3)):
        for label in range(10):
            folder = tmp_path / name / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(number):
                (folder / f"{index}.jpg").write_bytes(picture(10 * label + index))
    return tmp_path


@pytest.fixture
def config():
    size = {"size": 16, "resize": 20, "interpolation": "bicubic", "geometry": "squash"}
    return ConfigDict(
        {
            "model": "one dense layer",
            "weights": "weights.safetensors",
            "dataset": "folder:pets",
            "calibration_dataset": "folder:more",
            "preprocessing": size,
            "skip_corrupt": False,
            "calibration_size": 12,
            "test_limit": None,
            "eval_batch_size": 8,
            "preset": "nearest",
            "recipe": {"weight_bits": 2, "act_bits": 2, "reconstruction": {"init_samples": 8}},
        }
    )


@pytest.fixture
def argv(config, root, monkeypatch):
    """A command line whose config file is ``config`` as the test leaves it."""
    weights = np.random.default_rng(0).normal(size=(16 * 16 * 3, 10)).astype(np.float32)
    network = (lambda weights, x: x.reshape(len(x), -1) @ weights, weights)
    monkeypatch.setattr(models, "create", lambda name, weights: network)
    monkeypatch.setattr(command_line, "load_config", lambda spec, overrides: config)
    return ["quantize", "--config=x", f"--data_dir={root}", f"--workdir={root / 'run'}"]


def results(root):
    return json.loads((root / "run" / "results.json").read_text())


def test_scores_on_one_set_and_calibrates_on_another(argv, root, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert quantize.main(argv) == 0
    found = results(root)
    assert (found["calibration_samples"], found["test_samples"]) == (12, 20)
    assert found["float"]["samples"] == found["quantized"]["samples"] == 20
    assert found["corrupt_images"] == []
    assert "20/20" in (bar := capsys.readouterr().err)
    assert re.search(r"\d/s\]", bar)


def test_preprocessing_of_the_config_reaches_both_sets(config, root, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "load", lambda *arguments: seen.append(arguments) or stub())
    monkeypatch.setattr(models, "create", lambda name, weights: (lambda v, x: x[:, 0, 0], None))
    experiment.load(config, str(root))
    how = data.Preprocessing(size=16, resize=20, interpolation="bicubic", geometry="squash")
    assert [arguments[0] for arguments in seen] == ["folder:pets", "folder:more"]
    assert {arguments[2] for arguments in seen} == {how}


def stub():
    split = data.Split(np.zeros((30, 4, 4, 3), np.float32), np.zeros(30, np.int32))
    return data.source.in_memory("stub", 3, split, split)


def test_corrupt_images_end_the_run_or_are_counted_and_named(argv, config, root, capsys):
    files = [root / "pets" / "val" / "class3" / "1.jpg", root / "more" / "train" / "class4"]
    files = [files[0], *files[1].iterdir()]
    for file in files:
        file.write_bytes(file.read_bytes()[:150])
    assert quantize.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: corrupt image {files[0]} ")
    assert not (root / "run" / "results.json").exists()
    config.skip_corrupt = True
    config.calibration_size = 30
    assert quantize.main(argv) == 0
    found = results(root)
    assert (found["calibration_samples"], found["test_samples"]) == (27, 19)
    assert sorted(found["corrupt_images"]) == sorted(str(file) for file in files)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"calibration_size": 31}, "31 calibration samples asked of folder:"),
        ({"calibration_dataset": ""}, "name a calibration_dataset"),
        ({"dataset": "folder:none"}, "neither train/ nor val/"),
        ({"dataset": "imagenet2012"}, "ILSVRC2012_img_val.tar"),
        ({"preprocessing": {"interpolation": "cubic"}}, "bicubic"),
        ({"test_limit": 21}, "21 test samples asked"),
        ({"eval_batch_size": 0}, "batch_size is 0"),
        ({"weights": None}, "weights is None; it must be a string"),
        ({"augment": ["shift"]}, "unknown augment ['shift']"),
    ],
)
def test_bad_data_is_one_line_before_anything_is_scored(argv, config, root, capsys, fields, word):
    config.update(fields)
    assert quantize.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert word in error
    assert not (root / "run").exists()


def test_a_head_of_another_number_of_classes(argv, root, capsys):
    (root / "pets" / "val" / "class9").rename(root / "elsewhere")
    assert quantize.main(argv) == 2
    assert "the network tells 10 classes apart, the data 9" in capsys.readouterr().err


def test_images_with_other_channels_than_the_network_takes(argv, capsys, monkeypatch):
    network = (lambda kernel, x: x @ kernel, np.ones((1, 10), np.float32))
    monkeypatch.setattr(models, "create", lambda name, weights: network)
    assert quantize.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: one dense layer does not take the inputs of folder:")
    assert "of shape (8, 16, 16, 3): dot_general requires contracting dimensions" in error


def test_grey_digits_in_a_folder_are_read_as_their_network_takes_them(tmp_path):
    """The embedded network scores as on its own data set, whose images these are."""
    known = data.load("digits").test(50)
    for index, (image, label) in enumerate(zip(*known, strict=True)):
        folder = tmp_path / "val" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.round(255 * image[:, :, 0]).astype(np.uint8)
        Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(folder / f"{index}.png")
    (tmp_path / "val").rename(tmp_path / "train")
    (tmp_path / "val").symlink_to(tmp_path / "train")
    fields = {"dataset": f"folder:{tmp_path}", "calibration_size": "50"}
    config = command_line.load_config("configs/digits.py", fields)
    loaded = experiment.load(config, "/nonexistent")
    assert loaded.float_metrics["top1"] > 95
    found, drawn = loaded.dataset.test(), loaded.dataset.calibration(50)
    assert found.inputs.shape == (50, 8, 8, 1)
    one, two = (sorted(image.tobytes() for image in images) for images in (found[0], drawn[0]))
    assert one == two  # without random crops
    np.testing.assert_allclose(
        np.sort(found.inputs.sum(axis=(1, 2, 3))),
        np.sort(known.inputs.sum(axis=(1, 2, 3))),
        rtol=0.01,
    )


def test_another_calibration_draw_changes_nothing_but_the_seed(config, root, monkeypatch):
    drawn = []
    monkeypatch.setattr(aq, "quantize", lambda *given, **_: drawn.append(given[2]) or 1 / 0)
    calibration = data.load("folder:more", root, data.Preprocessing(size=16, resize=20))
    made = experiment.Experiment(lambda v, x: x, None, calibration, calibration, {})
    folder = run_directory.RunDirectory(root, None)
    for seed in (5, 5, 6):
        with pytest.raises(ZeroDivisionError):
            experiment.run(made, config, "x", seed, folder)
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.any(drawn[0] != drawn[2])


def test_public_efficientnet_lite0_recognises_what_it_should(shared_data):
    # All 1,300 samples give 82.31% (docs/results.md); these are what a test can afford.
    config = command_line.load_config("configs/efficientnet_lite0.py:w8a8", {"test_limit": "100"})
    metrics = experiment.load(config, shared_data).float_metrics
    assert metrics == pytest.approx({"top1": 82.0, "top5": 93.0, "samples": 100}, abs=1.5)
