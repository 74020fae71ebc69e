"""The parts that the benchmarks share."""

import json

import pytest

from aquant_jax.errors import InputError
from launch.bench import timing


def test_timers_take_turns_and_the_first_round_is_not_counted():
    order = []

    def timer(name):
        return lambda: order.append(name) or float(len(order))

    figures = timing.in_turns({"a": timer("a"), "b": timer("b")}, 2)
    assert order == ["a", "b"] * 3
    assert figures == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_every_call_is_made_once_before_it_is_timed():
    calls = []
    times = timing.milliseconds({"a": lambda: calls.append(1)}, rounds=2, repeat=3)
    assert len(times["a"]) == 2
    assert len(calls) == 3 * (1 + 3)  # rounds and the one before them; warm-up and repeats


def test_a_summary_is_median_and_interquartile_range():
    assert timing.summary([3.0]) == {"median": 3.0, "iqr": 0.0}
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == {"median": 4.0, "iqr": 4.0}


def test_a_report_is_printed_and_written(tmp_path, capsys):
    timing.report({"ms": 1.5}, None)
    assert json.loads(capsys.readouterr().out) == {"ms": 1.5}
    timing.report({"ms": 1.5}, str(tmp_path / "out.json"))
    assert (tmp_path / "out.json").read_text() == capsys.readouterr().out
    with pytest.raises(InputError, match=r"--out=.*out\.json cannot be written: No such file"):
        timing.report({"ms": 1.5}, str(tmp_path / "none" / "out.json"))
    assert json.loads(capsys.readouterr().out) == {"ms": 1.5}
