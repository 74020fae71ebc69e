"""``launch.allocate``, and ``launch.quantize`` with what it writes."""

import json

import pytest

import aquant_jax as aq
from launch import allocate, quantize
from launch.bench import layers
from tests.launch.conftest import DIGITS, SMALL

NEAREST = f"{DIGITS},preset=nearest"


def run(folder, *argv):
    return allocate.main(["allocate", DIGITS, *SMALL, f"--workdir={folder}", *argv])


def test_allocations_under_several_budgets_and_a_network_of_one(tmp_path, capsys, monkeypatch):
    folder, bits = tmp_path / "a", ("--weight_bits=2,3", "--act_bits=2")
    assert run(folder, "--budget=average_bits=2.5", *bits) == 0
    out = capsys.readouterr().out
    assert "predicted degradation" in out
    assert "errors measured" in out
    assert (folder / "front.png").stat().st_size
    results = json.loads((folder / "results.json").read_text())
    assert results["costs"]["weight_bits"] <= 2.5
    assert results["choices"] == ["w2a2", "w3a2"]
    # Another budget measures nothing, and what was there stays, though written meanwhile.
    first = (folder / "allocation.json").read_bytes()
    (folder / "allocation.json").unlink()
    (folder / "report.html").write_text("of the first")
    with monkeypatch.context() as patch:
        patch.setattr(allocate, "show", lambda _: (folder / "allocation.json").write_bytes(first))
        assert run(folder, "--budget=average_bits=3,2", *bits) == 0
    out = capsys.readouterr().out
    kept = folder / "earlier" / "1"
    assert f"the allocation of average_bits=2.5 is now in {kept}" in out
    assert f"\n0 errors measured; those before are in {folder / 'sensitivity.json'}" in out
    assert (kept / "allocation.json").read_bytes() == first
    assert json.loads((kept / "results.json").read_text()) == results
    assert (kept / "front.png").exists()
    assert (kept / "report.html").exists()
    assert not (folder / "report.html").exists()
    assert run(folder, "--budget=average_bits=3,2", *bits) == 0  # the same: nothing moves
    assert not (folder / "earlier" / "2").exists()
    (kept / "allocation.json").rename(tmp_path / "a.json")

    flag, workdir = f"--allocation={tmp_path / 'a.json'}", f"--workdir={tmp_path / 'q'}"
    assert quantize.main(["quantize", NEAREST, *SMALL, workdir, flag]) == 0
    layers = json.loads((tmp_path / "a.json").read_text())["layers"]
    identity = json.loads((tmp_path / "q" / "run.json").read_text())
    stored = identity["config"]["recipe"]["overrides"]
    assert [entry["weight_bits"] for entry in stored] == [
        layer["weight_bits"] for layer in layers.values()
    ]
    found = json.loads((tmp_path / "q" / "results.json").read_text())
    *front, this = found["pareto"]
    assert [point["name"] for point in front] == [*map(str, range(10))]
    assert this["name"] == "this"
    assert 1 > this["measured"] > this["predicted"]  # which counts on blocks that learn
    # Another allocation is another run.
    flag = f"--allocation={folder / 'allocation.json'}"
    assert quantize.main(["quantize", NEAREST, *SMALL, workdir, flag]) == 2
    assert "holds another run, which differs in config.recipe.overrides" in capsys.readouterr().err


def test_latencies_of_another_device(tmp_path, capsys):
    """One layer costs all the time at 3 bits."""
    bits, out = ("--weight_bits=2,3", "--act_bits=3"), tmp_path / "latencies.json"
    argv = [flag for flag in SMALL if "steps" not in flag]
    assert layers.main(["layers", DIGITS, *argv, *bits, f"--out={out}"]) == 0
    table = json.loads(out.read_text())
    assert all(time > 0 for times in table["latencies"].values() for time in times.values())
    free = [path for path, times in table["latencies"].items() if set(times) == {"w2a3", "w3a3"}]
    assert len(free) > 1
    for path, times in table["latencies"].items():
        table["latencies"][path] = dict.fromkeys(times, 0.25)
    table["latencies"][free[0]]["w3a3"] = 100
    out.write_text(json.dumps(table))
    folder, flag = tmp_path / "a", f"--latencies={out}"
    assert run(folder, "--budget=latency=50", *bits, flag) == 0
    found = json.loads((folder / "allocation.json").read_text())
    assert found["layers"][free[0]]["weight_bits"] == 2
    assert found["costs"]["latency"] == 0.25 * len(table["latencies"])

    table["latencies"][free[0]]["w3a3"] = "fast"
    out.write_text(json.dumps(table))
    assert run(tmp_path / "b", "--budget=latency=50", *bits, flag) == 2
    assert f"{out}: {free[0]} at 'w3a3' is 'fast'; it must be a number" in capsys.readouterr().err
    out.write_text("")
    assert run(tmp_path / "b", "--budget=latency=50", *bits, flag) == 2
    assert f"error: {flag} is not JSON" in capsys.readouterr().err
    out.write_text("[]")
    assert run(tmp_path / "b", "--budget=latency=50", *bits, flag) == 2
    assert f"{out} holds no milliseconds of layers by choice" in capsys.readouterr().err
    assert run(tmp_path / "b", "--budget=latency=50", *bits, "--latencies=absent.json") == 2
    assert "--latencies=absent.json cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget=3"], "--budget=3: '' is no number"),
        (["--budget=size=3"], "--budget=size=3: unknown name 'size'; there are bytes"),
        (["--budget=bytes=9", "--cost=bytes"], "--cost=bytes belongs to --budget=degradation=X"),
        (["--budget=degradation=1", "--cost=size"], "should be one of <bytes|average_bits|"),
        (["--budget=bytes=-1"], "--budget=bytes=-1: bytes is -1.0; it must be a number of 0"),
        (["--budget=bytes=3", "--weight_bits=two"], "--weight_bits has 'two'; give a list of 2"),
        (["--budget=bytes=3", "--act_bits=9"], "--act_bits has '9'; give a list of 2 to 8"),
        (["--budget=bytes=3", "--weight_bits="], "--weight_bits is empty; give a list of 2 to 8"),
        (
            ["--budget=bytes=3", "--borders=linear:mean:3"],
            "--borders has 'linear:mean:3'; give",
        ),
        (["--budget=bytes=3", "--borders=foo"], "--borders has 'foo'; unknown border 'foo'"),
        (["--budget=bytes=3"], "--budget=bytes=3: bytes 3 is below the least"),
        (
            ["--budget=average_bits=3,1"],
            "--budget=average_bits=3,1: average_bits of activations 1 is below the least, 2",
        ),
    ],
)
def test_bad_flags_are_one_line(argv, message, tmp_path, capsys):
    assert run(tmp_path / "a", *argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "a").exists()


def test_the_results_of_another_program_stay(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert run(tmp_path, "--budget=average_bits=3") == 2
    assert f"{tmp_path / 'results.json'} is of another program" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "{}"


@pytest.mark.parametrize("costs", [{}, {"weight_bits": "x", "act_bits": 3}])
def test_an_allocation_with_damaged_costs_is_one_line(costs, tmp_path, capsys):
    point, file = {"degradation": 0.5, "costs": costs}, tmp_path / "a.json"
    content = {"budget": {"average_bits": 3}, "layers": {}, "front": [], "table": []} | point
    content["recipe"] = aq.recipes.aquant(3, 3).to_dict()
    file.write_text(json.dumps(content))
    argv = ["quantize", DIGITS, f"--workdir={tmp_path / 'q'}", f"--allocation={file}"]
    assert quantize.main(argv) == 2
    assert f"error: --allocation={file} is malformed" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
