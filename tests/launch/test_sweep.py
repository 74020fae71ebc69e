"""``launch.sweep``: presets with a quantizer that pretends, and a table end to end on a tiny
ImageNet of class folders and a tiny network."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from aquant_jax import models
from launch import quantize, sweep
from launch.lib import command_line, experiment, paper_tables, plots
from tests.launch.conftest import DIGITS
from tests.support.nets import small_net

FEW = [
    "--config.calibration_size=32", "--config.test_limit=60",
    "--config.recipe.reconstruction.steps=2",
]  # fmt: skip


def read(path):
    return json.loads(path.read_text())


@pytest.mark.draws
def test_presets_resume_cell_by_cell_and_takes_more_seeds(pretend, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "run_plots", lambda *args: drawn.append(args[-1].parent.name))
    argv = ["sweep", DIGITS, "--presets=nearest,aquant", f"--workdir={tmp_path}", *FEW]
    assert sweep.main([*argv, "--seeds=0"]) == 0
    assert pretend == [("nearest", 0), ("aquant", 0)]
    (tmp_path / "nearest-s0" / "results.json").unlink()
    assert sweep.main([*argv, "--seeds=0,1"]) == 0
    assert pretend[2:] == [("nearest", 0), ("nearest", 1), ("aquant", 1)]
    results = read(tmp_path / "results.json")
    assert results["table"] in capsys.readouterr().out
    assert [row["preset"] for row in results["rows"]] == ["nearest", "aquant"]
    assert all(row["std"] == 0 and set(row["seeds"]) == {"0", "1"} for row in results["rows"])
    assert (tmp_path / "plots" / "accuracy.png").exists()
    assert drawn == [*("nearest-s0", "aquant-s0"), *("nearest-s0", "nearest-s1", "aquant-s1")]


def test_overrides_reach_every_preset_but_nearest_takes_no_steps(pretend, tmp_path):
    presets = "--presets=nearest,qdrop"
    overrides = [*FEW, "--config.recipe.reconstruction.batch_size=8"]
    assert sweep.main(["sweep", DIGITS, presets, f"--workdir={tmp_path}", *overrides]) == 0
    recipes = {
        name: read(tmp_path / f"{name}-s0" / "results.json")["recipe"]["reconstruction"]
        for name in ("nearest", "qdrop")
    }
    assert {name: recipe["steps"] for name, recipe in recipes.items()} == {"nearest": 0, "qdrop": 2}
    assert {recipe["batch_size"] for recipe in recipes.values()} == {8}


def test_row_takes_the_sample_deviation():
    cell = {"weight_bits": 2, "act_bits": 2, "float": {"top1": 99.0}, "seconds": 1, "device": "d"}
    cell |= {"metric": "top1"}
    cells = [cell | {"seed": s, "quantized": {"top1": v}} for s, v in enumerate((50.0, 54.0))]
    row = sweep.summarize("qdrop", cells)
    assert row["mean"] == 52
    assert row["std"] == pytest.approx(8**0.5)
    assert "| qdrop | w2a2 | 52.00 ± 2.83 | 99.00 | 47.00 | 2 | 1 |" in sweep.presets_table([row])
    assert "| bits | top-1 % |" in sweep.presets_table([row])
    assert "| bits | f1 % |" in sweep.presets_table([row | {"metric": "f1"}])


def test_the_best_is_bold_with_those_within_two_standard_errors():
    def row(preset, mean, standard_error):
        numbers = {"mean": mean, "std": 0.1, "standard_error": standard_error, "float": 99.0}
        bits = {"weight_bits": 2, "act_bits": 2, "metric": "top1", "seconds": 1.0}
        return {"preset": preset, "seeds": {"0": {}, "1": {}}, **numbers, **bits}

    def bold(*rows):
        lines = sweep.presets_table(rows).splitlines()[2:]
        return [line.split("|")[1].strip() for line in lines if "**" in line]

    # The difference to the best has a standard error of hypot(0.3, 0.4) = 0.5.
    best, close, far = row("a", 52.0, 0.3), row("b", 51.05, 0.4), row("c", 50.95, 0.4)
    assert bold(close, best, far) == ["b", "a"]
    assert bold(best) == []
    assert bold(best, row("d", 51.9, None)) == []


@pytest.mark.parametrize("program", [quantize, sweep])
def test_a_workdir_that_holds_another_run(program, pretend, tmp_path, capsys):
    argv = [DIGITS, f"--workdir={tmp_path}", *FEW]
    assert quantize.main(["quantize", *argv]) == 0
    before = sorted(tmp_path.rglob("*"))
    assert program.main(["program", *argv, "--config.test_limit=61"]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


TABLE_FLAGS = ["--models=resnet18", "--bits=w2a2", "--rows=aquant", "--variant=x"]
MODE = "give --config=FILE to compare presets, or --table to fill a table"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([DIGITS, "--seeds=a"], "seeds must be whole numbers such as 0,1,2, not 'a'"),
        ([DIGITS, "--seeds="], "seeds must be whole numbers"),
        ([DIGITS, f"--seeds={'9' * 5000}"], "seeds must be whole numbers"),
        (["--table=1", "--seeds=0,-1"], "seeds must be whole numbers such as 0,1,2, not '0,-1'"),
        ([DIGITS, "--presets=x"], "unknown preset 'x'; there are aquant, nearest"),
        ([DIGITS, "--presets="], "no presets; there are: nearest"),
        ([DIGITS, "--config.preset=nearest"], "--config.preset: a sweep takes --presets"),
        ([DIGITS, "--config.recipe.settle=0.3"], "'settle' is now 'reconstruction.final_full"),
        ([DIGITS, "--config.recipe.steps=3"], "it is now 'recipe.reconstruction.steps'"),
        (
            [DIGITS, "--config.recipe.border_granularity=tap"],
            "border_granularity is 'tap'; known: element, mean, channel",
        ),
        (
            [DIGITS, "--config.recipe.shared_across_taps=True"],
            "'shared_across_taps' is now 'border_granularity'",
        ),
        (["--table=3", "--config.recipe.fused=True"], "'fused' is now 'border_granularity'"),
        (["--table=4"], "value should be one of <1|2|3>"),
        ([], MODE),
        ([DIGITS, "--table=1"], MODE),
        (["--table=1", "--presets=aquant"], "--presets belongs to --config"),
        *(([DIGITS, flag], f"{flag.split('=')[0]} belongs to --table") for flag in TABLE_FLAGS),
    ],
)
def test_wrong_flags_are_one_line_and_leave_nothing(argv, words, tmp_path, capsys):
    assert sweep.main(["sweep", f"--workdir={tmp_path / 'run'}", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert list(tmp_path.iterdir()) == []


CLASSES, SIZE = 5, 6  # as many classes as the network tells apart
TINY = [
    "--config.dataset=folder:tiny", "--config.calibration_dataset=folder:tiny",
    "--config.calibration_size=8", "--config.eval_batch_size=8",
    "--config.recipe.reconstruction.steps=2", "--config.recipe.reconstruction.batch_size=4",
    f"--config.preprocessing.size={SIZE}", f"--config.preprocessing.resize={SIZE}",
]  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Flags of a run on a tiny set of images, with a tiny network named resnet18."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            folder = tmp_path / "tiny" / split / f"n{label}"
            folder.mkdir(parents=True)
            for index in range(3):
                pixels = rng.integers(0, 255, (SIZE + 2, SIZE + 4, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpeg")
    apply, variables = small_net()
    monkeypatch.setitem(models.MODELS, "resnet18", lambda weights, seed: (apply, variables))
    own = [f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    return ["sweep", "--table=1", "--models=resnet18", "--bits=w4a4", *own, *TINY]


@pytest.fixture
def interrupt(monkeypatch):
    """Counts the runs of cells; ``after`` of them, the next one is interrupted."""
    real, state = experiment.run, {"runs": 0, "after": None}

    def run(*args):
        if state["runs"] == state["after"]:
            raise KeyboardInterrupt
        state["runs"] += 1
        return real(*args)

    monkeypatch.setattr(experiment, "run", run)
    return state


def test_an_interrupted_table_goes_on_and_stands_beside_the_papers(tiny, tmp_path, interrupt):
    rows, interrupt["after"] = ["--rows=nearest,qdrop"], 1
    assert sweep.main(tiny + rows) == 130
    assert not (tmp_path / "run" / "table.md").exists()
    interrupt["after"] = None
    assert sweep.main(tiny + rows) == 0
    assert interrupt["runs"] == 2
    text = (tmp_path / "run" / "table.md").read_text()
    assert "| bits | method | resnet18 (paper) |" in text
    assert "(71.01) |" in text.splitlines()[2]
    assert "(-) |" in next(line for line in text.splitlines() if "nearest" in line)
    assert "(69.61) |" in next(line for line in text.splitlines() if "qdrop" in line)
    with (tmp_path / "run" / "table.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [(c["bits"], c["row"], c["paper"]) for c in cells] == [
        ("w4a4", "nearest", ""), ("w4a4", "qdrop", "69.61"),
    ]  # fmt: skip
    folder = tmp_path / "run" / "resnet18"
    for cell in cells:
        results = read(folder / f"w4a4-{cell['row']}-s0" / "results.json")
        assert cell["scores"] == f"{results['quantized']['top1']:.2f}"
    assert [c["steps"] for c in cells] == ["0", "2"]


def test_a_finished_table_runs_nothing_and_takes_more_rows(tiny, interrupt):
    assert sweep.main([*tiny, "--rows=nearest"]) == 0
    assert sweep.main([*tiny, "--rows=nearest"]) == 0
    assert interrupt["runs"] == 1
    assert sweep.main([*tiny, "--rows=nearest,brecq"]) == 0
    assert interrupt["runs"] == 2


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rows=best", "unknown row 'best' of table 1"),
        ("--models=vgg", "there is no config file"),
        ("--models=../x", "'../x' is not the name of a model; table 1 has resnet18"),
        ("--bits=w1a1", "unknown variant 'w1a1'"),
        ("--config.preprocessing.interpolation=sinc", "unknown interpolation 'sinc'"),
    ],
)
def test_what_does_not_exist_is_named(tiny, tmp_path, capsys, flag, words):
    assert sweep.main([*tiny, "--rows=nearest", flag]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_classes_than_the_head_has_is_an_error(tiny, tmp_path, capsys):
    extra = tmp_path / "tiny" / "val" / "n9"
    (tmp_path / "tiny" / "train" / "n9").mkdir()
    extra.mkdir()
    for split in ("train", "val"):
        image = tmp_path / "tiny" / split / "n9" / "0.jpeg"
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    assert sweep.main([*tiny, "--rows=nearest"]) == 2
    assert f"{CLASSES} classes apart, the data {CLASSES + 1}" in capsys.readouterr().err


def test_the_ablation_differs_from_aquant_in_the_border_alone():
    argv = ["sweep", "--table=3", "--workdir=x"]
    values, _ = command_line.parse(argv, sweep.define_flags, sweep.__doc__)
    # The fields that a row sets stay the row's, whatever else is given.
    overrides = {"recipe.border": "constant", "recipe.border_granularity": "mean"}
    planned = sweep.plan_table(values, overrides)
    assert list(planned) == ["resnet18", "regnetx_600mf"]
    recipes = {key: cell.config.recipe for key, cell in planned["resnet18"].items()}
    assert len(recipes) == 8
    for bits in ("w2a2", "w3a3"):
        base = recipes[bits, "aquant"].to_dict()
        for row, border, granularity in (
            ("aquant", "quadratic", "mean"),
            ("linear", "linear", "mean"),
            ("not fused", "quadratic", "element"),
            ("linear, not fused", "linear", "element"),
        ):
            wanted = base | {"border": border, "border_granularity": granularity}
            assert recipes[bits, row].to_dict() == wanted


def test_the_papers_ablation_starts_from_its_first_table():
    assert (
        paper_tables.TABLE_3["resnet18", "w2a2", "aquant"]
        == paper_tables.TABLE_1["resnet18", "w2a2", "aquant"]
    )
