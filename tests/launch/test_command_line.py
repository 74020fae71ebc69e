"""The common parts of all programs: --help that fits a screen, wrong flags, and the log."""

import importlib
import pkgutil
import re
import subprocess
import sys

import pytest
from absl import flags, logging

import launch
from aquant_jax.errors import InputError, ReconstructionError
from launch.lib import command_line, help_text
from tests.support.process import REPOSITORY

PROGRAMS = [
    module.name
    for module in pkgutil.walk_packages(launch.__path__, "launch.")
    if ".lib" not in module.name and not module.ispkg and module.name != "launch.bench.timing"
]


def test_these_are_all_programs():
    files = [*REPOSITORY.glob("launch/*.py"), *REPOSITORY.glob("launch/bench/*.py")]
    with_main = [path for path in files if "__main__" in path.read_text()]
    assert len(PROGRAMS) == len(with_main) >= 13


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_fits_a_screen_and_ends_in_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["program", "--help"])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    last = [line.strip() for line in lines if line.strip()][-3:]
    assert any(line.startswith(f"python -m {name}") for line in last)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_example_names_flags_that_exist(name):
    """All but the config's fields: each flag of an example is one of the program."""
    module = importlib.import_module(name)
    _, mark, example = module.__doc__.partition(help_text.EXAMPLE)
    assert mark
    example = example.replace("\\\n", " ")
    values = flags.FlagValues()
    getattr(module, "define_flags", lambda _: None)(values)
    for command in re.findall(r"python -m \S+(.*)", example):
        given = re.findall(r"--([a-z_]+)[= ]", command)
        assert set(given) - {"config"} <= set(values)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_wrong_flag_is_one_line(name, capsys):
    assert importlib.import_module(name).main(["program", "--colour=red"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Unknown command line flag 'colour'")
    assert error.count("\n") == 1


def test_a_path_of_other_bytes_than_utf8():
    values = flags.FlagValues()
    command_line.define_path(values, "workdir", None, "")
    with pytest.raises(flags.Error, match="a path must be UTF-8"):
        values(["program", "--workdir=runs/\udcff"])


def raising(error, *argv):
    @command_line.program
    def main(rest):
        assert rest == ["program"]
        raise error

    return main(["program", *argv])


def test_exit_codes(capsys):
    assert raising(InputError("wrong\n  input")) == 2
    assert raising(ReconstructionError("the loss is nan")) == 1
    assert raising(flags.Error("no flag")) == 2
    assert capsys.readouterr().err == (
        "error: wrong input\nerror: the loss is nan\nerror: no flag\n"
    )


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError("Unable to allocate 1 PiB"), 2, "not enough memory: Unable to allocate 1 PiB"),
        (ZeroDivisionError("a\nb"), 1, "ZeroDivisionError: a (--traceback shows where)"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on where it can resume"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2,
         "a/b: No such file or directory"),
        (BrokenPipeError(32, "Broken pipe"), 2, "standard output cannot be written: Broken pipe"),
        (OSError("odd"), 1, "OSError: odd (--traceback shows where)"),
    ],
)  # fmt: skip
def test_any_other_error_is_one_line(error, code, line, capsys):
    assert raising(error) == code
    assert capsys.readouterr().err == f"error: {line}\n"
    for kept in (error, InputError("wrong")):
        with pytest.raises(type(kept)):
            raising(kept, "--traceback")


def test_output_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert command_line.program(lambda _: print("results"))(["program"]) == 2
    error = "error: standard output cannot be written: No space left on device\n"
    assert capsys.readouterr().err == error


def test_the_log_is_shown_inside_a_program_only(capsys):
    @command_line.program
    def main(argv):
        logging.info("inside")
        return 3

    before = logging.get_verbosity(), list(logging.get_absl_logger().handlers)
    assert main(["program"]) == 3
    assert capsys.readouterr().err == ""  # this file is neither in aquant_jax/ nor in launch/
    assert (logging.get_verbosity(), list(logging.get_absl_logger().handlers)) == before


def test_a_program_starts_as_a_module_of_a_checkout():
    command = [sys.executable, "-m", "launch.report", "--nothing"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Unknown command line flag 'nothing'" in done.stderr
