"""``launch.table`` end to end on a tiny ImageNet of class folders and a tiny network."""

import csv

import numpy as np
import pytest
from PIL import Image

from aquant_jax import models
from launch import table
from launch.lib import experiment, paper_tables
from tests.support.nets import small_net
from tests.support.process import REPOSITORY

pytestmark = pytest.mark.user_model
CLASSES, SIZE = 5, 6  # as many classes as the network tells apart
TINY = [
    "--config.dataset=folder:tiny", "--config.calibration_dataset=folder:tiny",
    "--config.calibration_size=8", "--config.eval_batch_size=8", "--config.recipe.steps=2",
    "--config.recipe.batch_size=4", f"--config.preprocessing.size={SIZE}",
    f"--config.preprocessing.resize={SIZE}",
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
    monkeypatch.chdir(REPOSITORY)
    own = [f"--data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    return ["table", "--table=1", "--models=resnet18", "--bits=w4a4", *own, *TINY]


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
    with pytest.raises(KeyboardInterrupt):
        table.main(tiny + rows)
    assert not (tmp_path / "run" / "table.md").exists()
    interrupt["after"] = None
    assert table.main(tiny + rows) == 0
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
    assert all(0 <= float(c["scores"]) <= 100 for c in cells)
    assert [c["steps"] for c in cells] == ["0", "2"]


def test_a_finished_table_runs_nothing_and_takes_more_rows(tiny, interrupt):
    assert table.main([*tiny, "--rows=nearest"]) == 0
    assert table.main([*tiny, "--rows=nearest"]) == 0
    assert interrupt["runs"] == 1
    assert table.main([*tiny, "--rows=nearest,brecq"]) == 0
    assert interrupt["runs"] == 2


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--rows=best", "unknown row 'best' of table 1"),
        ("--models=vgg", "there is no config file"),
        ("--bits=w1a1", "unknown variant 'w1a1'"),
        ("--config.preprocessing.interpolation=sinc", "unknown interpolation 'sinc'"),
    ],
)
def test_what_does_not_exist_is_named(tiny, tmp_path, capsys, flag, words):
    assert table.main([*tiny, "--rows=nearest", flag]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "table.csv").exists()


def test_more_classes_than_the_head_has_is_an_error(tiny, tmp_path, capsys):
    extra = tmp_path / "tiny" / "val" / "n9"
    (tmp_path / "tiny" / "train" / "n9").mkdir()
    extra.mkdir()
    for split in ("train", "val"):
        image = tmp_path / "tiny" / split / "n9" / "0.jpeg"
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(image)
    assert table.main([*tiny, "--rows=nearest"]) == 2
    assert f"{CLASSES} classes apart, the data {CLASSES + 1}" in capsys.readouterr().err


def test_the_ablation_differs_from_aquant_in_the_border_alone(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    values, _ = table.common.parse(
        ["table", "--table=3", "--workdir=x"], table.define_flags, table.__doc__
    )
    # What the rows are about stays theirs, whatever else is asked for.
    planned = table.plan(values, {"recipe.border": "constant", "recipe.fused": "True"})
    assert list(planned) == ["resnet18", "regnetx_600mf"]
    recipes = {key: cell.config.recipe for key, cell in planned["resnet18"].items()}
    assert len(recipes) == 8
    for bits in ("w2a2", "w3a3"):
        base = recipes[bits, "aquant"].to_dict()
        for row, border, fused in (
            ("aquant", "quadratic", True),
            ("linear", "linear", True),
            ("not fused", "quadratic", False),
            ("linear, not fused", "linear", False),
        ):
            wanted = base | {"border": border, "fused": fused}
            assert recipes[bits, row].to_dict() == wanted
    assert (
        paper_tables.TABLE_3["resnet18", "w2a2", "aquant"]
        == paper_tables.TABLE_1["resnet18", "w2a2", "aquant"]
    )
