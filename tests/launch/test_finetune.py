"""Fine-tuning, and quantizing what comes out, as programs: on a tiny BERT and made-up sentences."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from aquant_jax.data import glue
from aquant_jax.data.glue import TASKS
from launch import finetune, quantize
from tests.launch.conftest import OPTAX
from tests.models.test_bert import TINY


def sentence(rng, good):
    words = rng.choice(["a", "film", "is", "good" if good else "bad"], 5)
    return " ".join([*words, "good" if good else "bad"]).encode()


@pytest.fixture(autouse=True, scope="module")
def prepared():
    """A task whose label is whether its sentences say "good" or "bad"."""

    def records(name, folder):
        task, rng = TASKS[name.removeprefix(glue.PREFIX)], np.random.default_rng(0)
        rows = [
            {**{key: sentence(rng, i % 2) for key in task.sentences}, "label": i % 2}
            for i in range(160)
        ]
        return {"train": rows[:128], task.validation: rows[128:]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glue, "open_splits", records)
        yield


def command(workdir, *flags, task="sst2", checkpoint=TINY):
    """A fine-tuning run."""
    own = [
        "--learning_rate=0.006",
        "--warmup=0.3",
        "--batch_size=4",
        "--epochs=4",
        "--max_length=12",
    ]
    where = [f"--workdir={workdir}", f"--checkpoint={checkpoint}"]
    return ["finetune", f"--task={task}", *where, *own, *flags]


@pytest.fixture
def argv(tmp_path):
    """`command` in a folder of this test."""
    return lambda *flags, workdir="run", **how: command(tmp_path / workdir, *flags, **how)


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("finetune") / "run"
    assert finetune.main(command(folder)) == 0
    return folder


def weights(folder):
    return load_file(folder / "checkpoint" / "model.safetensors")


def test_a_task_is_learnt_and_written_as_a_checkpoint(run, capsys):
    assert json.loads((run / "results.json").read_text())["score"]["accuracy"] == 100
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert not (run / "epochs").exists()
    assert (run / "checkpoint" / "vocab.txt").read_text() == (TINY / "vocab.txt").read_text()
    # A finished run is not repeated.
    before = (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    assert finetune.main(command(run)) == 0
    assert (run / "checkpoint" / "model.safetensors").stat().st_mtime_ns == before
    assert "sst2: accuracy 100.00% of 32 samples" in capsys.readouterr().out


def interrupt(monkeypatch, argv):
    """A run that is interrupted in its third epoch, which is trained and not kept."""
    evaluate, epochs = finetune.evaluate, iter(range(10))

    def interrupted(*args):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(finetune, "evaluate", interrupted)
    assert finetune.main(argv()) == 130
    monkeypatch.setattr(finetune, "evaluate", evaluate)


@OPTAX
@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(run, argv, tmp_path, monkeypatch):
    interrupt(monkeypatch, argv)
    trained = []
    monkeypatch.setattr(
        finetune, "batches", lambda *a, old=finetune.batches: trained.append(a[-1]) or old(*a)
    )
    assert finetune.main(argv()) == 0
    assert trained == [2, 3]
    one, two = (weights(folder) for folder in (run, tmp_path / "run"))
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])
    assert (tmp_path / "run/log.jsonl").read_text() == (run / "log.jsonl").read_text()


@OPTAX
def test_no_other_run_goes_on_with_the_epochs_of_one(argv, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, argv)
    folder = tmp_path / "run"
    # An error of the same command, here in its data, takes nothing with it.
    with monkeypatch.context() as patch:
        patch.setattr(glue, "open_splits", lambda name, folder: {})
        assert finetune.main(argv()) == 2
        assert "has no training split" in capsys.readouterr().err
    for other in (("--learning_rate=0.001",), ("--data_dir=/tmp",), ("--task=rte",)):
        assert finetune.main(argv(*other)) == 2
        assert "holds another run, which differs in" in capsys.readouterr().err
    for file in (folder / "epochs/2/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x")
    assert finetune.main(argv()) == 2
    assert "epochs is damaged; remove it to train from the start" in capsys.readouterr().err
    assert (folder / "run.json").exists()


@OPTAX
@pytest.mark.slow
def test_the_checkpoint_is_quantized_by_its_config(run, tmp_path):
    out = tmp_path / "quantized"
    argv = [
        "quantize", "--config=configs/glue_bert.py:sst2,w8a8,preset=nearest", f"--workdir={out}",
        f"--config.weights={run / 'checkpoint'}", "--config.recipe.granularity=layer",
        "--config.calibration_size=32", "--config.max_length=12", "--config.calibration_length=12",
        "--config.eval_batch_size=16", "--config.calibration_dataset=glue/rte",
    ]  # fmt: skip
    assert quantize.main(argv) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] == "accuracy"
    assert results["float"] == {"accuracy": 100.0, "samples": 32}
    assert results["quantized"]["accuracy"] > 90
    names = [block["name"] for block in results["blocks"]]
    assert len(names) == 14  # six layers twice, pooler and classifier


@OPTAX
@pytest.mark.slow
def test_a_regression_runs(argv, tmp_path):
    assert finetune.main(argv("--epochs=1", task="stsb")) == 0
    score = json.loads((tmp_path / "run" / "results.json").read_text())["score"]
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text())
    # The checkpoint that was written scores as the network that was trained.
    assert score == {"pearson": pytest.approx(logged["pearson"]), "samples": 32}
    assert score["pearson"] != 0  # as it were if all outputs were equal


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_length=13"], "sequences of 13 tokens do not fit the 12 positions"),
        (["--batch_size=129"], "128 samples are less than a batch of 129"),
        (["--task=wnli"], "wnli"),
        (["--learning_rate=nan"], "--learning_rate=nan: it must be finite"),
        (["--checkpoint=/nowhere"], "no checkpoint in /nowhere"),
        (["--config.seed=1"], "unknown flag --config.seed: no config is read here"),
    ],
)
def test_wrong_flags_are_one_line_and_leave_nothing(argv, tmp_path, capsys, flags, message):
    assert finetune.main(argv(*flags)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_a_token_of_validation_beyond_the_vocabulary_is_found_before_training(
    argv, tmp_path, monkeypatch, capsys
):
    stored = finetune.bert.check_inputs
    seen = []

    def check(config, batch):
        if seen:  # the first is the training split
            batch = {**batch, "ids": np.where(batch["ids"] > 0, config.vocab_size, 0)}
        seen.append(len(batch["ids"]))
        stored(config, batch)

    monkeypatch.setattr(finetune.bert, "check_inputs", check)
    assert finetune.main(argv()) == 2
    assert "the model has a table of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_head_of_another_task_is_one_line(tmp_path, capsys):
    folder = shutil.copytree(TINY, tmp_path / "three")
    argv = ["quantize", "--config=configs/glue_bert.py:rte", f"--config.weights={folder}"]
    lengths = ["--config.max_length=12", "--config.calibration_length=12"]
    sizes = ["--config.calibration_size=32", f"--workdir={tmp_path / 'out'}"]
    assert quantize.main([*argv, *lengths, *sizes]) == 2
    assert "a head of 3 labels; the task needs 2" in capsys.readouterr().err
    assert quantize.main([*argv, *sizes[1:], *lengths]) == 2
    assert "1024 calibration samples asked of glue/rte" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
