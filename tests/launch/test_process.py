"""Settings of the programs' processes."""

import gc
import signal
import time

import jax
import pytest

import launch
from launch.lib import command_line, process
from tests.support.process import run_python

PROGRAM = """
import jax, jax.numpy as jnp
from jax._src import monitoring
from launch.lib import command_line

hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))

@command_line.program
def main(argv):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: jnp.sort(jnp.sin(x)) @ x)(jnp.ones((8, 8)))

for _ in range(2):
    assert main(["program"]) == 0
    print(sum(hits) > 0)
    jax.clear_caches()  # what the process itself keeps
"""


def run(**environment):
    """Whether the first and the second run of a program read what was compiled before."""
    done = run_python(PROGRAM, **{"JAX_COMPILATION_CACHE_DIR": "", "HOME": "", **environment})
    assert done.returncode == 0, done.stderr
    return [line == "True" for line in done.stdout.split()]


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_second_run_does_not_compile_again(tmp_path):
    assert run(HOME=str(tmp_path)) == [False, True]
    assert files(tmp_path / ".cache" / "aquant-jax" / "compiled")


@pytest.fixture
def settings():
    """JAX's settings of its cache, which are those of before after the test."""
    names = [name for name in jax.config.values if "_cache_" in name]
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("given", "base", "expected"),
    [
        (None, "/base", "/base/aquant-jax/compiled"),
        ("/given", "/base", "/given"),
        (None, "relative", None),
    ],
)
def test_the_folder_of_compiled_programs(settings, monkeypatch, given, base, expected):
    jax.config.update("jax_compilation_cache_dir", given)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    process.keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == expected


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "aquant-jax").write_text("a file")
    assert run(XDG_CACHE_HOME=str(tmp_path)) == [False, False]


def test_ctrl_c_in_a_garbage_collection_ends_the_program(capsys):
    def interrupt(phase, info):
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    @command_line.program
    def main(argv):
        gc.callbacks.append(interrupt)
        gc.collect()
        time.sleep(5)

    signal.signal(signal.SIGINT, launch.stop_import)  # as `python -m launch.NAME` starts
    assert main(["program"]) == 130
    assert (error := capsys.readouterr().err).startswith("error: interrupted")
    assert error.count("\n") == 1


def test_ctrl_c_while_a_program_is_imported_ends_it():
    done = run_python("""
import signal, sys
sys.argv = ["-m"]
import launch
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
""")
    assert (done.returncode, done.stderr) == (130, "error: interrupted\n")
