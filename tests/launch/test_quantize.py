"""``launch.quantize`` and ``launch.evaluate``, run in this process."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import data, models
from launch import evaluate, quantize
from launch.lib import experiment
from tests.launch.conftest import DIGITS, SMALL
from tests.support.process import REPOSITORY

FEW = ["--config.calibration_size=32", "--config.test_limit=60"]
STEPS = "--config.recipe.reconstruction.steps=2"


def read(path):
    return json.loads(path.read_text())


@pytest.mark.draws
def test_quantize_writes_results_log_and_plots(pretend, tmp_path, capsys):
    path = tmp_path / "run"
    assert quantize.main(["quantize", DIGITS, f"--workdir={path}", "--seed=3", *FEW, STEPS]) == 0
    results = read(path / "results.json")
    assert results["float"] == results["quantized"]
    assert (results["seed"], results["calibration_samples"], results["test_samples"]) == (3, 32, 60)
    assert (results["weight_bits"], results["act_bits"], results["preset"]) == (2, 2, "aquant")
    assert results["recipe"]["reconstruction"]["steps"] == 2
    assert results["config"] == "configs/digits.py:w2a2"
    assert {"jax", "jaxlib", "flax", "aquant-jax", "python"} <= set(results["versions"])
    assert results["device"].startswith("cpu")
    assert [block["name"] for block in results["blocks"]] == ["block0", "block1"]
    log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [line["loss_curve"] for line in log] == [[[0, 2], [1, 1]]] * 2
    names = ["block_error.png", "borders.png", "loss.png", "propagated_error.png"]
    assert sorted(plot.name for plot in (path / "plots").iterdir()) == names
    assert "aquant w2a2 seed 3" in capsys.readouterr().out


def test_a_finished_run_is_printed_and_not_repeated(pretend, tmp_path, capsys):
    argv = ["quantize", DIGITS, f"--workdir={tmp_path}", *FEW, STEPS]
    assert quantize.main(argv) == 0
    first = capsys.readouterr().out
    assert quantize.main(argv) == 0
    assert capsys.readouterr().out == first
    assert len(pretend) == 1
    (tmp_path / "results.json").write_text("{}")
    assert quantize.main(argv) == 2
    assert f"{tmp_path / 'results.json'} is malformed: KeyError" in capsys.readouterr().err


WRONG = {
    "no config": ([], "config"),
    "no such config file": (["--config=configs/none.py"], "configs/none.py"),
    "unknown variant": (["--config=configs/digits.py:w1a1"], "w2a2"),
    "unknown preset": (["--config=configs/digits.py:preset=x"], "qdrop"),
    "unknown field": ([DIGITS, "--config.recipe.stesp=1"], "steps"),
    "unknown flag": ([DIGITS, "--sede=1"], "sede"),
    "flag of a wrong type": ([DIGITS, "--seed=x"], "seed"),
    "seed below zero": ([DIGITS, "--seed=-1"], "seed"),
    "old field": ([DIGITS, "--config.recipe.settle=0.3"], "'reconstruction.final_full_quant_fra"),
    "moved field": ([DIGITS, "--config.recipe.steps=5"], "recipe.reconstruction.steps"),
    "no Python": (["--config=README.md"], "README.md is not a Python file"),
    "limit that is not a number": ([DIGITS, "--config.test_limit=abc"], "test_limit is 'abc'"),
    "augment": ([DIGITS, "--config.augment=mixup"], "unknown augment 'mixup'; known: shift"),
    "fields of BERT": ([DIGITS, "--config.model=bert"], "needs the config fields max_length, cal"),
    "loss": ([DIGITS, "--config.recipe.reconstruction.finetune_loss=l1"], "known: mse, kl"),
    "overrides": ([DIGITS, "--config.recipe.overrides=[5]"], "overrides: 5 must be an aq.Override"),
    "field of a wrong type": ([DIGITS, "--config.recipe.reconstruction.steps=x"], "steps=x"),
    "empty workdir": ([DIGITS, "--workdir="], "--workdir=: a path cannot be empty"),
    "NUL in a path": ([DIGITS, "--data_dir=a\0b"], "a path cannot hold a NUL byte"),
    "unknown home": ([DIGITS, "--data_dir=~nosuchuser/x"], "home folder of '~nosuchuser/x' is unk"),
    "long workdir": ([DIGITS, f"--workdir=a/{'b' * 300}"], "File name too long"),
    "long config": ([f"--config={'b' * 300}.py"], "there is no config file"),
    "long weights": ([DIGITS, f"--config.weights=/{'b' * 300}"], "File name too long"),
    "NUL in the weights": ([DIGITS, "--config.weights=/a\0b"], "there is no such file"),
    "stray argument": ([DIGITS, "runs/x"], "runs/x"),
    "bits": ([DIGITS, "--config.recipe.weight_bits=9"], "9"),
    "unknown border": ([DIGITS, "--config.recipe.border=cubic"], "cubic"),
    "calibration too large": ([DIGITS, "--config.calibration_size=1298"], "1297"),
    "test limit": ([DIGITS, "--config.test_limit=501"], "500"),
    "unknown model": ([DIGITS, "--config.model=vgg"], "digits_cnn"),
    "unknown dataset": ([DIGITS, "--config.dataset=svhn"], "cifar10"),
    "unprepared dataset": (
        ["--config=configs/digits.py", "--config.dataset=cifar10", "--data_dir=/nonexistent"],
        "download_and_prepare",
    ),
    "missing weights": (
        ["--config=configs/digits.py", "--config.weights=/nonexistent/mine.safetensors"],
        "mine.safetensors",
    ),
    "missing weights at home": (
        ["--config=configs/digits.py", "--config.weights=~/nonexistent/mine.safetensors"],
        f"{Path.home()}/nonexistent/mine.safetensors",
    ),
}


@pytest.mark.parametrize(("flags", "word"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_one_line_and_leaves_nothing(flags, word, tmp_path, capsys):
    assert quantize.main(["quantize", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_meant(pretend, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quantize.main(["quantize", DIGITS, "--workdir=~/run", *FEW, STEPS]) == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_the_limit_of_a_score_is_checked(capsys):
    argv = ["evaluate", DIGITS, "--checkpoint=/nonexistent", "--config.test_limit=x"]
    assert evaluate.main(argv) == 2
    assert "test_limit is 'x'; it must be a positive integer" in capsys.readouterr().err


def test_a_finished_run_does_not_answer_for_other_data(pretend, tmp_path, capsys):
    argv = ["quantize", DIGITS, f"--workdir={tmp_path}", *FEW, STEPS]
    assert quantize.main([*argv, "--data_dir=/one"]) == 0
    assert quantize.main([*argv, "--data_dir=/two"]) == 2
    assert "data_dir ('/one' there, '/two' here)" in capsys.readouterr().err


def test_an_unwritable_workdir(pretend, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert quantize.main(["quantize", DIGITS, f"--workdir={tmp_path / 'file' / 'run'}"]) == 2
    assert capsys.readouterr().err.endswith("run cannot be written: Not a directory\n")
    assert pretend == []


def test_a_reconstruction_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise aq.ReconstructionError("block block1 (conv1): the loss is nan")

    monkeypatch.setattr(aq, "quantize", fail)
    assert quantize.main(["quantize", DIGITS, f"--workdir={tmp_path}", *FEW, STEPS]) == 1
    assert capsys.readouterr().err == "error: block block1 (conv1): the loss is nan\n"
    assert not (tmp_path / "results.json").exists()


def test_a_bug_keeps_its_traceback_where_that_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "load", lambda *_: 1 / 0)
    argv = ["quantize", DIGITS, f"--workdir={tmp_path}"]
    with pytest.raises(ZeroDivisionError):
        quantize.main([*argv, "--traceback"])
    assert quantize.main(argv) == 1


@pytest.fixture(scope="module")
def nearest(tmp_path_factory):
    """The directory of a run without a terminal, and its standard error."""
    path = tmp_path_factory.mktemp("nearest") / "run"
    config = f"--config={REPOSITORY}/configs/digits.py:w8a8,preset=nearest"
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert quantize.main(["quantize", config, f"--workdir={path}", *FEW]) == 0
    return path, error.getvalue()


@pytest.fixture
def nearest_run(nearest):
    return nearest[0]


def test_end_to_end_by_nearest(nearest_run):
    results = read(nearest_run / "results.json")
    assert results["quantized"]["top1"] >= results["float"]["top1"] - 2
    assert [block["steps"] for block in results["blocks"]] == [0] * 5
    assert (nearest_run / "plots" / "propagated_error.png").exists()
    assert not (nearest_run / "plots" / "borders.png").exists()


# The other presets differ in their recipes alone, which tests/test_quantize.py runs.
def test_end_to_end_by_aquant(finished_run):
    results = read(finished_run / "results.json")
    assert results["quantized"]["top1"] > 20  # two steps at 2 bits; by chance it were 10
    assert [block["steps"] for block in results["blocks"]] == [2] * 5
    assert (finished_run / "plots" / "propagated_error.png").exists()
    assert (finished_run / "plots" / "borders.png").exists()
    assert read(finished_run / "blocks" / "fingerprint.json")["call"]["backend"] == "gpu_ops"


def test_a_saved_network_is_scored_from_itself_alone(nearest_run, capsys, monkeypatch):
    results = read(nearest_run / "results.json")
    monkeypatch.setattr(models, "create", None)  # neither the model nor its weights are used
    argv = ["evaluate", "--config=configs/digits.py", "--config.test_limit=60"]
    assert evaluate.main([*argv, f"--checkpoint={nearest_run / 'quantized'}"]) == 0
    out = capsys.readouterr().out
    assert f"{results['quantized']['top1']:.2f}% top-1 of 60 samples" in out
    assert "borders add 0.00%" in out
    assert evaluate.main([*argv, f"--checkpoint={nearest_run}"]) == 2
    assert f"{nearest_run} is not a checkpoint: manifest.json" in capsys.readouterr().err


def test_a_saved_network_is_compared_with_the_float_one(nearest_run, capsys):
    argv = ["evaluate", "--config=configs/digits.py", "--config.test_limit=60", "--against_float"]
    checkpoint = nearest_run / "quantized"
    assert evaluate.main([*argv, f"--checkpoint={checkpoint}"]) == 0
    images = data.load("digits").test(60).inputs
    apply, variables = models.create("digits_cnn", models.EMBEDDED["digits_cnn"])
    both = aq.restore(checkpoint)(images), apply(variables, images)
    same = np.mean(np.equal(*(np.argmax(logits, axis=-1) for logits in both)))
    assert f"the class of the float network for {100 * same:.2f}% of 60" in capsys.readouterr().out


def test_a_restart_keeps_the_blocks_before_and_replaces_the_results(finished_run, tmp_path, capsys):
    path = shutil.copytree(finished_run, tmp_path / "run")
    argv = ["quantize", DIGITS, f"--workdir={path}", *SMALL]
    blocks = sorted((path / "blocks").glob("0*"))
    before = [(block / "manifest.json").read_bytes() for block in blocks]
    longer = [*argv, "--config.recipe.reconstruction.step_lr=1e-2"]
    assert quantize.main(longer) == 2
    assert "recipe.reconstruction.step_lr (4e-05 there, 0.01 here)" in capsys.readouterr().err
    assert quantize.main([*longer, "--config.recipe.phi=clamp", "--restart_from_block=4"]) == 2
    may = "(a restart may change recipe.reconstruction and augment only)"
    assert may in capsys.readouterr().err
    assert quantize.main([*longer, "--restart_from_block=4"]) == 0
    after = [(block / "manifest.json").read_bytes() for block in blocks]
    assert [one == two for one, two in zip(before, after, strict=True)] == [True] * 4 + [False]
    learning = read(path / "results.json")["recipe"]["reconstruction"]
    assert learning["step_lr"] == 1e-2
    log = (path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in log] == [0, 1, 2, 3, 4]


def test_without_a_terminal_the_blocks_are_logged_and_orbax_is_not(nearest):
    lines = nearest[1].splitlines()
    blocks = [line for line in lines if "] block " in line]
    assert [line.split("] ")[1].split(":")[0] for line in blocks] == [
        f"block {i}/5 {name}"
        for i, name in enumerate(("stem", "block1", "block2", "block3", "head"), 1)
    ]
    assert all(line.startswith("I") and "observer.py" in line for line in blocks)
    assert [line for line in lines if "arrays" in line] == []  # orbax logs its folders at INFO
