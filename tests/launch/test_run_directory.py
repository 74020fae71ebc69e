import contextlib
import errno
import json
import os
import shutil

import numpy as np
import pytest

from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.storage import archive, json_file
from aquant_jax.storage.folder_lock import LOCK
from launch import export, quantize
from launch.lib import run_directory
from tests.support.process import REPOSITORY

OLD = {
    layout: REPOSITORY / "tests" / "golden" / f"layout_{layout}" / "run_directory"
    for layout in (1, 2)
}


def files(path):
    """The names in a folder, but for the lock of the process that holds it."""
    return sorted(p.name for p in path.iterdir() if p.name != LOCK) if path.exists() else None


def fail(path, identity, error):
    """Writes a little into a claimed folder, then raises."""
    with run_directory.claim(path, identity) as run:
        run.log({"block": 0})
        (run.plots / "x.png").touch()
        raise error


def test_results_come_last_and_are_read_back(tmp_path):
    with run_directory.claim(tmp_path / "run", {"seed": 0}) as run:
        run.log({"block": 0, "curve": np.eye(2, dtype=np.float32)})
        run.log({"block": 1, "loss": float("nan")})
        assert files(run.path) == ["log.jsonl", "run.json"]
        run.finish({"top1": np.float32(0.5)})
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines == [{"block": 0, "curve": [[1, 0], [0, 1]]}, {"block": 1, "loss": None}]
    with run_directory.claim(tmp_path / "run", {"seed": 0}) as run:
        assert run.stored == {"top1": 0.5, "plots": []}


def test_a_full_disk_is_told_and_finished_blocks_stay(tmp_path):
    (tmp_path / "run" / "blocks" / "000").mkdir(parents=True)
    json_file.write_json(tmp_path / "run" / "run.json", {"layout": 3, "seed": 0})
    with pytest.raises(InputError, match=r"run cannot be written: No space left on device"):
        fail(tmp_path / "run", {"seed": 0}, OSError(errno.ENOSPC, "No space left on device"))
    assert (tmp_path / "run" / "blocks" / "000").exists()


def test_blocks_are_used_after_a_full_disk_while_a_restart_begins(tmp_path, monkeypatch):
    (tmp_path / "blocks" / "000").mkdir(parents=True)
    json_file.write_json(tmp_path / "run.json", {"layout": 3, "seed": 0})

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_json", full)
        with (
            pytest.raises(InputError, match="No space left"),
            run_directory.claim(tmp_path, {"seed": 0}, restart=True) as run,
        ):
            run.begin()
    with run_directory.claim(tmp_path, {"seed": 0}) as run:
        assert list(run.blocks.iterdir()) == [tmp_path / "blocks" / "000"]


def test_other_errors_of_the_system_are_not_the_workdirs(tmp_path):
    with pytest.raises(FileNotFoundError):
        fail(tmp_path / "run", {"seed": 0}, FileNotFoundError(errno.ENOENT, "a data file"))


def test_an_unfinished_run_starts_afresh(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path, {"seed": 0}, KeyboardInterrupt())
    with run_directory.claim(tmp_path, {"seed": 0}) as run:
        assert run.stored is None
        assert files(tmp_path) == ["log.jsonl", "plots", "run.json"]  # until it is accepted
        run.begin()
        assert files(tmp_path) == ["plots", "run.json"]  # no results list the plots: they stay


def test_another_run_is_rejected_and_left_alone(tmp_path):
    with run_directory.claim(tmp_path, {"seed": 0, "recipe": {"steps": 10}}) as run:
        run.finish({"top1": 1.0})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with (
        pytest.raises(InputError, match=r"another run.*recipe\.steps \(10 there, 20 here\)"),
        run_directory.claim(tmp_path, {"seed": 0, "recipe": {"steps": 20}}),
    ):
        pass
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "name", ["results.json", "export/onnx/network.onnx", "quantized/x", "checkpoint/x", "notes.txt"]
)
@pytest.mark.parametrize("restart", [False, True])
def test_a_folder_of_unknown_origin_is_left_alone(tmp_path, name, restart):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    (tmp_path / ".lock").write_text("mine, too")
    first = name.partition("/")[0]
    with (
        pytest.raises(InputError, match=f"holds {first} of unknown origin: there is no run.json"),
        run_directory.claim(tmp_path, {}, restart),
    ):
        pass
    assert (tmp_path / name).read_text() == "mine"
    assert (tmp_path / ".lock").read_text() == "mine, too"


def finished_run(path):
    with run_directory.claim(path, {"seed": 0}) as run:
        run.log({"block": 0})
        (run.plots / "ours.png").touch()
        archive.write(run.network, {"codes": np.zeros(3)}, {})
        export = path / "export" / "onnx"
        export.mkdir(parents=True)
        (export / "network.onnx").touch()
        json_file.write_json(export / "report.json", {"bytes": {"network.onnx": 0}})
        run.finish({"top1": 1.0})


def test_a_restart_removes_what_the_run_wrote(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "plots" / "mine.png").write_text("mine")
    (tmp_path / "export" / "mine").mkdir()
    with run_directory.claim(tmp_path, {"seed": 0}, restart=True) as run:
        run.begin()
    assert files(tmp_path) == ["export", "plots", "run.json"]
    assert files(tmp_path / "plots") == ["mine.png"]
    assert files(tmp_path / "export") == ["mine"]


@pytest.mark.parametrize("name", ["quantized/mine.txt", "export/onnx/mine.txt"])
def test_a_restart_that_would_remove_a_users_file_removes_nothing(tmp_path, name):
    finished_run(tmp_path)
    (tmp_path / name).write_text("mine")
    before = archive.sizes(tmp_path)
    with (
        pytest.raises(InputError, match=f"{name} is of unknown origin; move it elsewhere"),
        run_directory.claim(tmp_path, {"seed": 0}, restart=True) as run,
    ):
        run.begin()
    assert archive.sizes(tmp_path) == before


def test_a_restart_needs_a_run(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with (
            pytest.raises(InputError, match=f"{path} .*: there is no run to restart"),
            run_directory.claim(path, {}, restart=True),
        ):
            pass
    assert files(tmp_path) == []


def test_a_second_claim_is_told_who_holds_the_directory(tmp_path):
    with run_directory.claim(tmp_path / "run", {"seed": 0}) as run:
        run.log({"block": 0})
        holder = f"in use by process {os.getpid()} on "
        for restart in (False, True):
            with (
                pytest.raises(InputError, match=holder),
                run_directory.claim(tmp_path / "run", {"seed": 0}, restart),
            ):
                pass
        assert files(run.path) == ["log.jsonl", "run.json"]
        run.finish({})
    with run_directory.claim(tmp_path / "run", {"seed": 0}) as run:
        assert run.stored == {"plots": []}
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("model", ["", "resnet18"])
def test_an_error_keeps_the_cells_of_a_sweep_and_its_own_owner(tmp_path, model):
    def sweep():
        with run_directory.claim(tmp_path / "sweep", {"program": "sweep"}):
            finished_run(tmp_path / "sweep" / model / "qdrop-s0")
            raise InputError("wrong")

    with pytest.raises(InputError, match="wrong"):
        sweep()
    with run_directory.claim(tmp_path / "sweep", {"program": "sweep"}):
        assert (tmp_path / "sweep" / model / "qdrop-s0" / "results.json").exists()


def test_a_user_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError):
        fail(tmp_path / "run", {}, InputError("wrong"))
    assert files(tmp_path) == []


def test_an_error_after_the_results_leaves_them(tmp_path):
    with contextlib.suppress(BrokenPipeError), run_directory.claim(tmp_path, {"seed": 0}) as run:
        run.finish({"top1": 1.0})
        raise BrokenPipeError
    with run_directory.claim(tmp_path, {"seed": 0}) as run:
        assert run.stored == {"top1": 1.0, "plots": []}


def test_an_error_leaves_no_parent_folders_behind(tmp_path):
    for error in (InputError("wrong"), ValueError("a bug")):
        with pytest.raises(type(error)):
            fail(tmp_path / "a" / "b" / "run", {}, error)
        assert files(tmp_path) == []


def test_a_reconstruction_that_failed_keeps_its_log(tmp_path):
    with pytest.raises(ReconstructionError):
        fail(tmp_path / "run", {}, ReconstructionError("nan"))
    assert "log.jsonl" in files(tmp_path / "run")


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_workdir_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match="workdir"),
        run_directory.claim(tmp_path / "file" / below, {}),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{", r"run\.json is not JSON"),
        ("run.json", "[]", r"run\.json is damaged: it holds \[\], not an object"),
        ("run.json", "null", r"run\.json is damaged: it holds None, not an object"),
        ("run.json", '{"layout": []}', r"layout \[\], written by another version of aquant-jax"),
        ("results.json", "3", r"results\.json is damaged: it holds 3, not an object"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    finished_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message), run_directory.claim(tmp_path, {"seed": 0}):
        pass
    assert (tmp_path / name).read_text() == text


def test_a_directory_says_its_layout(tmp_path):
    with run_directory.claim(tmp_path, {"seed": 0}):
        assert json_file.read_json(tmp_path / "run.json") == {"layout": 3, "seed": 0}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("layout", OLD)
def test_a_directory_of_an_earlier_layout_is_refused_and_left_alone(tmp_path, layout, restart):
    path = shutil.copytree(OLD[layout], tmp_path / "run")
    before = {file: file.read_bytes() for file in path.iterdir()}
    identity = json_file.read_json(path / "run.json")
    identity.pop("layout", None)
    message = f"run has {archive.written_by(layout)}; choose another --workdir$"
    with pytest.raises(InputError, match=message), run_directory.claim(path, identity, restart):
        pass
    assert {file: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("program", "argv"),
    [(quantize, ["--config=configs/digits.py:w2a2"]), (export, ["--format=onnx"])],
    ids=["quantize", "export"],
)
@pytest.mark.parametrize("layout", OLD)
def test_programs_refuse_it_in_one_line(program, argv, layout, tmp_path, capsys):
    path = shutil.copytree(OLD[layout], tmp_path / "run")
    assert program.main(["program", *argv, f"--workdir={path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path} has {archive.written_by(layout)}" in error
    assert files(path) == ["log.jsonl", "results.json", "run.json"]


def test_a_restart_may_change_how_blocks_are_learned_and_nothing_else(tmp_path):
    def identity(preset="aquant", bits=2, steps=10):
        recipe = {"weight_bits": bits, "reconstruction": {"steps": steps}}
        return {"config": {"preset": preset, "recipe": recipe}, "seed": 0}

    with run_directory.claim(tmp_path, identity()) as run:
        run.log({"block": 0})
        run.finish({"top1": 1.0})
    message = r"recipe\.weight_bits \(2 there, 3 here\) \(a restart may change recipe\.reconstruc"
    with (
        pytest.raises(InputError, match=message),
        run_directory.claim(tmp_path, identity(bits=3, steps=20), restart=True),
    ):
        pass
    with run_directory.claim(tmp_path, identity("qdrop", steps=20), restart=True) as run:
        assert run.stored is None
        assert files(tmp_path) == ["log.jsonl", "results.json", "run.json"]
        run.begin()
        assert files(tmp_path) == ["run.json"]
    assert json_file.read_json(tmp_path / "run.json") == {"layout": 3, **identity("qdrop", 2, 20)}
