"""The programs, run in this process; most with a quantizer that only pretends."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import aquant_jax as aq
from aquant_jax import models
from launch import compare, evaluate, quantize, train_digits
from launch.lib import experiment
from tests.support.process import REPOSITORY

pytestmark = pytest.mark.user_model

DIGITS = "--config=configs/digits.py:w2a2"
SMALL = ["--config.calibration_size=32", "--config.test_limit=60", "--config.recipe.steps=2"]


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def pretend(monkeypatch):
    """Replaces quantize by one that returns the float network and two made-up blocks."""
    calls = []

    def quantize_nothing(apply, variables, calibration, recipe, *, seed=0, on_block=None, **_):
        calls.append((recipe.preset, seed))
        reports = tuple(make_report(index) for index in range(2))
        for report in reports:
            on_block(report)
        return Pretended(apply=apply, variables=variables, recipe=recipe, reports=reports)

    monkeypatch.setattr(aq, "quantize", quantize_nothing)
    monkeypatch.setattr(aq, "save", lambda *_: None)
    return calls


class Pretended(SimpleNamespace):
    def __call__(self, x):
        return self.apply(self.variables, x)

    def summary(self):
        border = {
            name: np.full((9, 4), value) for name, value in (("b0", 0.4), ("b1", 0.1), ("b2", 0))
        }
        border = border if self.recipe.border else None
        fields = {"act_bits": 2, "zero_point": 0, "phi": "clamp", "fused": True}
        return [
            SimpleNamespace(path="stem", border=None, **fields),
            SimpleNamespace(path="block1/conv1", border=border, **fields),
        ]


def make_report(index):
    return aq.BlockReport(
        index=index,
        name=f"block{index}",
        layers=(f"conv{index}",),
        steps=2,
        loss_curve=np.array([[0, 2.0], [1, 1.0]]),
        start_error=2.0,
        final_error=1.0,
        kept_start=False,
        seconds=0.5,
        propagated=np.column_stack([np.linspace(0, 1, 16), np.full((16, 3), 0.25)]),
    )


def read(path):
    return json.loads(path.read_text())


def test_quantize_writes_results_log_and_plots(pretend, tmp_path, capsys):
    path = tmp_path / "run"
    assert quantize.main(["quantize", DIGITS, f"--workdir={path}", "--seed=3", *SMALL]) == 0
    results = read(path / "results.json")
    assert results["float"] == results["quantized"]
    assert (results["seed"], results["calibration_samples"], results["test_samples"]) == (3, 32, 60)
    assert (results["weight_bits"], results["act_bits"], results["preset"]) == (2, 2, "aquant")
    assert results["recipe"]["steps"] == 2
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
    argv = ["quantize", DIGITS, f"--workdir={tmp_path}", *SMALL]
    assert quantize.main(argv) == 0
    first = capsys.readouterr().out
    assert quantize.main(argv) == 0
    assert capsys.readouterr().out == first
    assert len(pretend) == 1


def test_compare_resumes_cell_by_cell_and_takes_more_seeds(pretend, tmp_path, capsys):
    argv = ["compare", DIGITS, "--presets=nearest,aquant", f"--workdir={tmp_path}", *SMALL]
    assert compare.main([*argv, "--seeds=0"]) == 0
    assert pretend == [("nearest", 0), ("aquant", 0)]
    (tmp_path / "nearest-s0" / "results.json").unlink()
    assert compare.main([*argv, "--seeds=0,1"]) == 0
    assert pretend[2:] == [("nearest", 0), ("nearest", 1), ("aquant", 1)]
    results = read(tmp_path / "results.json")
    assert results["table"] in capsys.readouterr().out
    assert [row["preset"] for row in results["rows"]] == ["nearest", "aquant"]
    assert all(row["std"] == 0 and set(row["seeds"]) == {"0", "1"} for row in results["rows"])
    assert (tmp_path / "plots" / "accuracy.png").exists()
    assert (tmp_path / "aquant-s1" / "plots" / "borders.png").exists()


def test_overrides_reach_every_preset_but_nearest_takes_no_steps(pretend, tmp_path):
    presets = "--presets=nearest,qdrop"
    overrides = [*SMALL, "--config.recipe.batch_size=8"]
    assert compare.main(["compare", DIGITS, presets, f"--workdir={tmp_path}", *overrides]) == 0
    recipes = {
        name: read(tmp_path / f"{name}-s0" / "results.json")["recipe"]
        for name in ("nearest", "qdrop")
    }
    assert {name: recipe["steps"] for name, recipe in recipes.items()} == {"nearest": 0, "qdrop": 2}
    assert {recipe["batch_size"] for recipe in recipes.values()} == {8}


def test_row_takes_the_sample_deviation():
    cell = {"weight_bits": 2, "act_bits": 2, "float": {"top1": 99.0}, "seconds": 1, "device": "d"}
    cell |= {"metric": "top1"}
    cells = [cell | {"seed": s, "quantized": {"top1": v}} for s, v in enumerate((50.0, 54.0))]
    row = compare.row("qdrop", cells)
    assert row["mean"] == 52
    assert row["std"] == pytest.approx(8**0.5)
    assert "| qdrop | w2a2 | 52.00 ± 2.83 | 99.00 | 47.00 | 2 | 1 |" in compare.table([row])
    assert "| bits | top-1 % |" in compare.table([row])
    assert "| bits | f1 % |" in compare.table([row | {"metric": "f1"}])


WRONG = {
    "no config": ([], "config"),
    "no such config file": (["--config=configs/none.py"], "configs/none.py"),
    "unknown variant": (["--config=configs/digits.py:w1a1"], "w2a2"),
    "unknown preset": (["--config=configs/digits.py:preset=x"], "qdrop"),
    "unknown field": ([DIGITS, "--config.recipe.stesp=1"], "steps"),
    "unknown flag": ([DIGITS, "--sede=1"], "sede"),
    "flag of a wrong type": ([DIGITS, "--seed=x"], "seed"),
    "seed below zero": ([DIGITS, "--seed=-1"], "seed"),
    "no Python": (["--config=README.md"], "README.md is no Python file"),
    "limit that is no number": ([DIGITS, "--config.test_limit=abc"], "test_limit is 'abc'"),
    "overrides": ([DIGITS, "--config.recipe.overrides=[5]"], "overrides: 5 is no dict"),
    "field of a wrong type": ([DIGITS, "--config.recipe.steps=x"], "steps"),
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
}


@pytest.mark.parametrize(("flags", "word"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_one_line_and_leaves_nothing(flags, word, tmp_path, capsys):
    assert quantize.main(["quantize", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert word in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [quantize, compare])
def test_a_workdir_that_holds_another_run(program, pretend, tmp_path, capsys):
    argv = [DIGITS, f"--workdir={tmp_path}", *SMALL]
    assert quantize.main(["quantize", *argv]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert program.main(["program", *argv, "--config.test_limit=61"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_finished_run_does_not_answer_for_other_data(pretend, tmp_path, capsys):
    argv = ["quantize", DIGITS, f"--workdir={tmp_path}", *SMALL]
    assert quantize.main([*argv, "--data_dir=/one"]) == 0
    assert quantize.main([*argv, "--data_dir=/two"]) == 2
    assert "data_dir ('/one' there, '/two' here)" in capsys.readouterr().err


def test_an_unwritable_workdir(pretend, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert quantize.main(["quantize", DIGITS, f"--workdir={tmp_path / 'file' / 'run'}"]) == 2
    assert capsys.readouterr().err.startswith("error: workdir")
    assert pretend == []


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--seeds=a"], "whole numbers"), (["--presets=x"], "qdrop"), (["--presets="], "no presets")],
)
def test_wrong_rows_and_seeds_of_compare(flags, word, tmp_path, capsys):
    assert compare.main(["compare", DIGITS, f"--workdir={tmp_path / 'run'}", *flags]) == 2
    assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_reconstruction_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise aq.ReconstructionError("block block1 (conv1): the loss is nan")

    monkeypatch.setattr(aq, "quantize", fail)
    assert quantize.main(["quantize", DIGITS, f"--workdir={tmp_path}", *SMALL]) == 1
    assert capsys.readouterr().err == "error: block block1 (conv1): the loss is nan\n"
    assert not (tmp_path / "results.json").exists()


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantize.main(["quantize", DIGITS, f"--workdir={tmp_path}"])


def test_train_writes_a_checkpoint_that_the_zoo_reads(tmp_path, capsys):
    output = tmp_path / "digits.safetensors"
    assert train_digits.main(["train", f"--output={output}", "--epochs=2"]) == 0
    score = float(capsys.readouterr().out.split("held-out: ")[1].split("%")[0])
    assert score > 60
    assert train_digits.main(["train", f"--output={tmp_path / 'none' / 'x'}"]) == 2


# The others differ in their recipes alone, which test_pipeline runs.
@pytest.mark.parametrize("preset", ["nearest", "aquant"])
def test_end_to_end(preset, tmp_path):
    config = f"--config=configs/digits.py:w8a8,preset={preset}"
    small = [flag for flag in SMALL if preset != "nearest" or "steps" not in flag]
    assert quantize.main(["quantize", config, f"--workdir={tmp_path}", *small]) == 0
    results = read(tmp_path / "results.json")
    assert results["quantized"]["top1"] >= results["float"]["top1"] - 2
    assert results["blocks"]
    assert (tmp_path / "plots" / "propagated_error.png").exists()
    assert (tmp_path / "plots" / "borders.png").exists() == (preset == "aquant")


def test_a_saved_network_is_scored_from_itself_alone(tmp_path, capsys, monkeypatch):
    path = tmp_path / "run"
    nearest = f"{DIGITS},preset=nearest"
    assert quantize.main(["quantize", nearest, f"--workdir={path}", *SMALL[:2]]) == 0
    results = read(path / "results.json")
    monkeypatch.setattr(models, "create", None)  # neither the model nor its weights are used
    argv = ["evaluate", "--config=configs/digits.py", "--config.test_limit=60"]
    assert evaluate.main([*argv, f"--checkpoint={path / 'quantized'}"]) == 0
    out = capsys.readouterr().out
    assert f"{results['quantized']['top1']:.2f}% top-1 of 60 samples" in out
    assert "borders add 0.00%" in out
    assert evaluate.main([*argv, f"--checkpoint={path}"]) == 2
    assert f"{path} is no checkpoint: manifest.json" in capsys.readouterr().err


def test_a_restart_keeps_the_blocks_before_and_replaces_the_results(tmp_path, capsys):
    argv = ["quantize", DIGITS, f"--workdir={tmp_path / 'run'}", *SMALL]
    assert quantize.main(argv) == 0
    blocks = sorted((tmp_path / "run" / "blocks").glob("0*"))
    before = [(block / "manifest.json").read_bytes() for block in blocks]
    longer = [*argv, "--config.recipe.step_lr=1e-2"]
    assert quantize.main(longer) == 2
    assert "recipe.step_lr" in capsys.readouterr().err
    assert quantize.main([*longer, "--restart_from_block=3"]) == 0
    after = [(block / "manifest.json").read_bytes() for block in blocks]
    assert [one == two for one, two in zip(before, after, strict=True)] == [True] * 3 + [False] * 2
    assert read(tmp_path / "run" / "results.json")["recipe"]["step_lr"] == 1e-2
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in log] == [0, 1, 2, 3, 4]
