"""The report of made-up runs: what a reader finds in it, whatever the names in it are."""

import sys

import pytest

from aquant_jax.errors import InputError
from aquant_jax.reporting import svg
from aquant_jax.reporting.page import page
from aquant_jax.reporting.run import Run
from tests.support.html_page import Page

HOSTILE = 'a<b>&"c"</script><script>alert(1)</script>$x_1$'
HISTOGRAM = {"low": -1.25, "high": 4.25, "counts": [0, 1, 5, 2] * 16}


def layer(path, **fields):
    return {
        "path": path, "kind": "conv", "shape": [3, 3, 4, 8], "weight_bits": 2, "act_bits": 2,
        "step_size": 0.125, "zero_point": 1, "error": 0.0625, "border": "quadratic",
        "border_granularity": "mean", "codes": [1, 2, 3, 4], "weights": HISTOGRAM,
        "activations": HISTOGRAM, **fields,
        "border_curves": {"u": [0, 3], "curves": [[0.5, 0.9]], "bend": 0.4, "coefficients": 108},
    }  # fmt: skip


def block(index, name, *layers):
    clusters = [[1.0, 0.1, 0.2, 5], [None, None, None, 0], [2.0, -0.1, 0.2, 4]]
    return {
        "index": index, "name": name, "layers": layers, "steps": 20, "start_error": 2.0,
        "final_error": 0.5 + index, "fell_back_to_nearest": False, "seconds": 1.25,
        "propagated": clusters if index else [],
    }  # fmt: skip


def run(name="aquant", path="conv1", score=88.5, **fields):
    results = {
        "preset": name, "weight_bits": 2, "act_bits": 2, "recipe": {"steps": 20, "inner": {"x": 1}},
        "seconds": 2.5, "blocks": [block(0, "stem", path), block(1, "head", "fc")],
        "bytes": {"floating": 4000, "codes": 300, "borders": 200}, "finetune": None, "seed": 0,
        "metric": "top1", "float": {"top1": 91.0}, "quantized": {"top1": score},
        "device": "cpu: cpu", "versions": {"jax": "0.10.2"}, "config": "configs/x.py", **fields,
    }  # fmt: skip
    layers = [layer(path), layer("fc", weight_bits=8, codes=[1] * 256, error=None)]
    return Run(name, results, {0: [[10, 2.0], [20, 1.0]], 1: [[10, 3.0], [20, 2.5]]}, layers)


def test_a_run_has_its_tables_figures_command_and_versions():
    text = page([run(command="python -m launch.quantize --seed=0")], "Title")
    found = Page(text)
    assert found.open == []
    heads, first, second = found.tables["layers-table"]
    assert [row[0] for row in (first, second)] == ["conv1", "fc"]
    values = dict(zip(heads, first, strict=True))
    assert [values[name] for name in ("W bits", "A bits", "step size", "error", "border")] == [
        "2", "2", "0.125", "0.0625", "quadratic, mean",
    ]  # fmt: skip
    assert values["block error"] == "0.5"
    assert dict(zip(heads, second, strict=True))["error"] == "–"
    for words in (
        "88.50%",
        "float2.50lost",
        "12.5%",
        "launch.quantize --seed=0",
        "0.10.2",
        "inner.x",
    ):
        assert words in found.text
    labels = found.named("aria-label")
    for label in (
        "Learned borders of conv1", "Weights of conv1 and their grid",
        "Loss of stem over its steps",
        "Activations of conv1 and their grid", "Propagated error at the input of head",
        "Error of every block before and after reconstruction", "Seconds a block",
        "Bytes of the network, float and packed",
    ):  # fmt: skip
        assert labels.count(label) == 1
    assert "runs-table" not in found.tables


def test_a_page_refers_to_no_other_file_and_takes_its_colours_from_its_style():
    text = page([run(), run("qdrop")], "Title")
    found = Page(text)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in found.elements}
    assert found.named("src") == []
    assert all(link.startswith("#") for link in found.named("href"))
    ids = found.named("id")
    assert all(link[1:] in ids for link in found.named("href"))
    assert "prefers-color-scheme: dark" in text
    drawn = text.split("<main", 1)[1]
    assert "var(--s0)" in drawn
    assert "var(--s1)" in drawn
    assert not svg._COLOUR.search(drawn)
    assert "url(" not in text.replace("url(#", "")


def test_names_are_text_whatever_is_in_them():
    text = page([run(HOSTILE, HOSTILE, command=HOSTILE)], HOSTILE)
    found = Page(text)
    assert found.open == []
    assert found.count("script") == 1
    assert found.count("b") == text.count('class="tile"')
    assert found.tables["layers-table"][1][0] == HOSTILE
    assert f"Weights of {HOSTILE} and their grid" in found.named("aria-label")
    assert found.text.count(HOSTILE) >= 3


def test_seeds_have_a_mean_and_runs_share_the_axes_of_their_blocks():
    seeds = [
        run(f"aquant-s{seed}", score=score, seed=seed)._replace(
            group="aquant", layers=(), link=f"aquant-s{seed}/report.html"
        )
        for seed, score in enumerate((80.0, 84.0))
    ]
    found = Page(page([*seeds, run("qdrop")._replace(layers=())], "Title"))
    assert found.tables["seeds-table"][1] == ["aquant", "2", "82.00", "2.83"]
    assert [row[0] for row in found.tables["runs-table"][1:]] == ["aquant-s0", "aquant-s1", "qdrop"]
    assert "aquant-s1/report.html" in found.named("href")
    assert found.named("class").count("key") == 2
    assert found.named("aria-label").count("Loss of stem over its steps") == 1
    assert "layers-table" not in found.tables


def test_blocks_learned_on_other_numbers_of_devices_are_named():
    resumed = run()
    blocks = resumed.results["blocks"]
    assert "devices" not in Page(page([resumed], "Title")).text
    blocks[0]["devices"] = blocks[1]["devices"] = 4
    assert "aquant: learned on 4 devices." in Page(page([resumed], "Title")).text
    blocks[1]["devices"] = 1
    assert (
        "learned on different numbers of devices: stem on 4, head on 1. From head on, codes may "
        "differ" in Page(page([resumed], "Title")).text
    )


def test_two_runs_stand_side_by_side():
    found = Page(page([run(), run("qdrop", score=80.0)], "Title"))
    rows = found.tables["layers-table"][1:]
    assert [row[:2] for row in rows] == [
        ["conv1", "aquant"], ["conv1", "qdrop"], ["fc", "aquant"], ["fc", "qdrop"],
    ]  # fmt: skip
    assert found.named("aria-label").count("Weights of conv1 and their grid") == 2


def test_a_pareto_front_is_drawn_and_listed():
    points = [
        {"name": "3 bits", "cost": 300, "predicted": 0.25, "measured": 0.5},
        {"name": "2 bits", "cost": 200, "predicted": 1.5, "measured": None},
    ]
    found = Page(page([run(pareto=points, pareto_cost="bytes")], "Title"))
    assert found.tables["pareto-table"][1:] == [
        ["3 bits", "300", "0.25", "0.5"], ["2 bits", "200", "1.5", "–"],
    ]  # fmt: skip
    assert "Pareto front of degradation against bytes" in found.named("aria-label")
    assert "pareto-table" not in Page(page([run()], "Title")).tables
    runs = [run(pareto=points[:1]), run("other", pareto=points[1:]), run(pareto=points[:1])]
    both = Page(page(runs, "Title")).tables
    assert [both[name][1][0] for name in ("pareto-table", "pareto-table-1")] == ["3 bits", "2 bits"]
    assert "pareto-table-2" not in both
    # Runs of one front stand on it, with what each measured.
    runs = [
        run(name, pareto=[*points, {"name": "this", "cost": 250, "predicted": 1.0, "measured": m}])
        for name, m in (("s0", 0.75), ("s1", 0.875))
    ]
    both = Page(page(runs, "Title")).tables
    assert [row[0] for row in both["pareto-table"][1:]] == ["3 bits", "2 bits", "s0", "s1"]
    assert both["pareto-table"][-1][-1] == "0.875"
    assert "pareto-table-1" not in both


def test_a_large_network_stays_under_3_mb(monkeypatch):
    drawn = page([run()], "Title")
    one = len(drawn) - len(page([run()._replace(layers=())], "Title"))
    layers = [layer(f"stage/{k}") for k in range(100)]
    calls = []
    drawing = svg.ElementTree.fromstring("<svg/>")
    monkeypatch.setattr("aquant_jax.reporting.figures.draw", lambda *_: calls.append(1) or drawing)
    text = page([run()._replace(layers=layers)], "Title")
    assert "The first 64 layers are drawn." in text
    assert 64 * one / 2 < 2.5e6  # `one` is of two layers
    assert len(calls) < 64 * 3 + 10


def test_without_matplotlib(monkeypatch):
    svg.matplotlib.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[report\]' in the clone"):
        page([run()], "Title")
    svg.matplotlib.cache_clear()
