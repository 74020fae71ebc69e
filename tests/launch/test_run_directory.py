import errno
import json
import shutil

import numpy as np
import pytest

from aquant_jax.errors import InputError, ReconstructionError
from aquant_jax.storage import json_file
from launch import export, quantize
from launch.lib import run_directory
from tests.support.process import REPOSITORY

OLD = REPOSITORY / "tests" / "golden" / "layout_1" / "run_directory"


def files(path):
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else None


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
        assert run.stored == {"top1": 0.5}


def test_a_full_disk_is_told_and_finished_blocks_stay(tmp_path):
    (tmp_path / "run" / "blocks" / "000").mkdir(parents=True)
    json_file.write_json(tmp_path / "run" / "run.json", {"layout": 2, "seed": 0})
    with pytest.raises(InputError, match=r"run cannot be written: No space left on device"):
        fail(tmp_path / "run", {"seed": 0}, OSError(errno.ENOSPC, "No space left on device"))
    assert (tmp_path / "run" / "blocks" / "000").exists()


def test_blocks_are_used_after_a_full_disk_while_the_folder_is_claimed(tmp_path, monkeypatch):
    (tmp_path / "blocks" / "000").mkdir(parents=True)
    json_file.write_json(tmp_path / "run.json", {"layout": 2, "seed": 0})

    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_json", full)
        with pytest.raises(InputError, match="No space left"):
            fail(tmp_path, {"seed": 0}, AssertionError())
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
        assert files(tmp_path) == ["run.json"]


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


def test_files_of_unknown_origin_are_left_alone(tmp_path):
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(InputError, match=r"results\.json"), run_directory.claim(tmp_path, {}):
        pass
    assert (tmp_path / "results.json").read_text() == "mine"


def test_a_user_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError):
        fail(tmp_path / "run", {}, InputError("wrong"))
    assert files(tmp_path) == []


def test_an_error_leaves_no_parent_folders_behind(tmp_path):
    for error in (InputError("wrong"), ValueError("a bug")):
        with pytest.raises(type(error)):
            fail(tmp_path / "a" / "b" / "run", {}, error)
        assert files(tmp_path) == []


def test_a_reconstruction_that_failed_keeps_its_log(tmp_path):
    with pytest.raises(ReconstructionError):
        fail(tmp_path / "run", {}, ReconstructionError("nan"))
    assert "log.jsonl" in files(tmp_path / "run")


def test_a_user_error_keeps_what_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError):
        fail(tmp_path, {}, InputError("wrong"))
    assert files(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_workdir_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match="workdir"),
        run_directory.claim(tmp_path / "file" / below, {}),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_damaged_owner_file(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with (
        pytest.raises(InputError, match=r"run\.json is not JSON"),
        run_directory.claim(tmp_path, {}),
    ):
        pass


def test_a_directory_says_its_layout(tmp_path):
    with run_directory.claim(tmp_path, {"seed": 0}):
        assert json_file.read_json(tmp_path / "run.json") == {"layout": 2, "seed": 0}


@pytest.mark.parametrize("restart", [False, True])
def test_a_directory_of_version_0_1_is_refused_and_left_alone(tmp_path, restart):
    path = shutil.copytree(OLD, tmp_path / "run")
    before = {file: file.read_bytes() for file in path.iterdir()}
    identity = json_file.read_json(OLD / "run.json")
    message = "run has layout 1, written by aquant-jax 0.1.0; this version reads layout 2"
    with pytest.raises(InputError, match=message), run_directory.claim(path, identity, restart):
        pass
    assert {file: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize(
    ("program", "argv"),
    [(quantize, ["--config=configs/digits.py:w2a2"]), (export, ["--format=onnx"])],
    ids=["quantize", "export"],
)
def test_programs_refuse_it_in_one_line(program, argv, tmp_path, capsys):
    path = shutil.copytree(OLD, tmp_path / "run")
    assert program.main(["program", *argv, f"--workdir={path}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path} has layout 1, written by aquant-jax 0.1.0" in error
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
    assert json_file.read_json(tmp_path / "run.json") == {"layout": 2, **identity("qdrop", 2, 20)}
