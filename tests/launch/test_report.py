"""``launch.report``, and the page in a browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

import aquant_jax as aq
from aquant_jax.allocation.result import Entry, FrontPoint
from launch import report
from launch.lib import allocations, reports
from launch.lib.run_directory import RunDirectory
from tests.support.html_page import Page

pytestmark = pytest.mark.draws
CHROMIUM = shutil.which("chromium")
WIDTHS = (390, 1440)


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def sweep(run, tmp_path):
    """The workdir of a sweep with that run as one of two."""
    path = tmp_path / "sweep"
    for name in ("aquant-s0", "qdrop-s0"):
        shutil.copytree(run, path / name)
    rows = [{"preset": "aquant"}, {"preset": "qdrop"}, {"preset": "nearest"}]
    identity = json.loads((run / "run.json").read_text()) | {"program": "sweep"}
    (path / "run.json").write_text(json.dumps(identity))
    content = {"config": "digits.py", "rows": rows, "command": "python -m launch.sweep"}
    (path / "results.json").write_text(json.dumps(content))
    return path


def test_a_run_writes_its_report_and_it_is_rebuilt_to_the_byte(run, capsys):
    written = (run / "report.html").read_bytes()
    assert len(written) < 3e6
    (run / "report.html").unlink()
    assert report.main(["report", f"--workdir={run}"]) == 0
    assert f"{run}/report.html: {len(written):,} bytes" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == written
    found = Page(written.decode())
    layers = json.loads((run / "layers.json").read_text())
    assert [row[0] for row in found.tables["layers-table"][1:]] == [r["path"] for r in layers]
    assert all(record["error"] > 0 for record in layers)
    results = json.loads((run / "results.json").read_text())
    assert results["command"].startswith("python -m launch.quantize --config=configs/digits.py")
    assert results["command"] in found.text
    assert {"Loss of block1 over its steps", "Learned borders of block1/conv1/kernel"} <= set(
        found.named("aria-label")
    )


def test_a_run_without_measured_layers_shows_those_of_its_network(run):
    (run / "layers.json").unlink()
    assert report.main(["report", f"--workdir={run}"]) == 0
    found = Page((run / "report.html").read_text())
    assert "Weights of head/kernel and their grid" in found.named("aria-label")
    assert "Activations of head/kernel and their grid" not in found.named("aria-label")


def test_two_runs_and_a_sweep(run, sweep, tmp_path, capsys):
    both = [f"--workdir={sweep / 'aquant-s0'}", f"--against={sweep / 'qdrop-s0'}"]
    assert report.main(["report", *both]) == 0
    found = Page((sweep / "aquant-s0" / "report_against.html").read_text())
    assert [row[0] for row in found.tables["runs-table"][1:]] == ["aquant-s0", "qdrop-s0"]
    assert len(found.tables["layers-table"]) == 1 + 2 * 9
    own = (sweep / "aquant-s0" / "report.html").read_bytes()
    assert own == (run / "report.html").read_bytes()
    assert report.main(["report", f"--workdir={sweep}", f"--output={tmp_path / 's.html'}"]) == 0
    found = Page((tmp_path / "s.html").read_text())
    assert [row[0] for row in found.tables["runs-table"][1:]] == ["aquant-s0", "qdrop-s0"]
    assert "qdrop-s0/report.html" in found.named("href")
    assert "python -m launch.sweep" in found.text


def allocated(path):
    """A workdir of launch.allocate, with one layer and a front of two."""
    path.mkdir()
    costs = {"bytes": 90.0, "weight_bits": 2.0, "act_bits": 3.0}
    table = (Entry("a", "w2a3", 0.5, costs, True), Entry("a", "w3a3", 0.25, costs, False))
    layers = {"a": aq.Override("^a$", weight_bits=2)}
    front = (FrontPoint(0.5, costs, layers), FrontPoint(0.25, costs | {"bytes": 120.0}, {}))
    budget = aq.Budget(bytes=100)
    aq.Allocation(aq.recipes.aquant(3, 3), layers, budget, 0.5, costs, front, table).save(
        path / "allocation.json"
    )
    content = {"config": "configs/x.py", "budget": "bytes=100", "seconds": 2.5, "command": "typed"}
    (path / "results.json").write_text(json.dumps(content))
    return path


def test_an_allocation_alone_and_beside_a_run_that_was_made_of_it(run, tmp_path, capsys):
    path = allocated(tmp_path / "allocated")
    assert report.main(["report", f"--workdir={path}"]) == 0
    found = Page((path / "report.html").read_text())
    assert found.tables["allocation-table"][1:] == [["a", "w2a3", "0.5", "90"]]
    rows = [["0", "90", "0.5", "–"], ["1", "120", "0.25", "–"], ["this", "90", "0.5", "–"]]
    assert found.tables["pareto-table"][1:] == rows
    for words in ("Allocation of configs/x.py, bytes=100", "typed", "2 sof measuring"):
        assert words in found.text
    results = json.loads((run / "results.json").read_text())
    origin = allocations.points(aq.Allocation.load(path / "allocation.json"))
    origin["pareto"][-1]["measured"] = 0.75
    (run / "results.json").write_text(json.dumps(results | origin))
    assert report.main(["report", f"--workdir={run}", f"--against={path}"]) == 0
    found = Page((run / "report_against.html").read_text())
    assert [row[1] for row in found.tables["runs-table"][1:]] == 2 * ["w2a3 on average"]
    assert "top-1, quantized to w2a3 on average" in found.text
    rows[2:] = [["run", "90", "0.5", "0.75"], ["allocated", "90", "0.5", "–"]]
    assert found.tables["pareto-table"][1:] == rows
    (path / "allocation.json").rename(path / "sensitivity.json")  # as before the end
    capsys.readouterr()
    assert report.main(["report", f"--workdir={path}"]) == 2
    assert "no finished allocation: no allocation.json is in it" in capsys.readouterr().err


def test_bad_input_is_one_line_and_leaves_everything(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reports, "page", lambda runs, *_: runs[0].results["blocks"][0]["name"])
    empty, unfinished, other = tmp_path / "empty", tmp_path / "unfinished", tmp_path / "other"
    torn, damaged, edited = tmp_path / "torn", tmp_path / "damaged", tmp_path / "edited"
    empty.mkdir()
    for path in (unfinished, other, torn, damaged, edited):
        shutil.copytree(run, path)
    (torn / "log.jsonl").write_text('{"index": 0, "loss_c')
    (damaged / "results.json").write_text('{"preset": "aquant"}')
    results = json.loads((run / "results.json").read_text())
    (edited / "results.json").write_text(json.dumps(results | {"blocks": [{}]}))
    (unfinished / "results.json").unlink()
    identity = json.loads((other / "run.json").read_text()) | {"program": "finetune"}
    (other / "run.json").write_text(json.dumps(identity))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    wrong = {
        f"--workdir={tmp_path / 'none'}": "holds no finished run: there is no run.json in it",
        f"--workdir={empty}": "holds no finished run: there is no run.json in it",
        f"--workdir={unfinished}": "holds no finished run: there is no results.json in it",
        f"--workdir={torn}": "log.jsonl is malformed: JSONDecodeError",
        f"--workdir={damaged}": "results.json is damaged: it lacks act_bits, blocks, metric",
        f"--workdir={edited}": f"{edited} is malformed: KeyError: 'name'",
        f"--workdir={other}": "holds a run of launch.finetune",
        f"--workdir={run} --against={run}": "is the workdir itself",
        f"--workdir={run} --against={empty}": "holds no finished run",
        f"--workdir={run} --output={run}": "cannot be written: Is a directory",
        f"--workdir={run} --output=.": "report . cannot be written",
        f"--workdir={run} --output={run}/run.json/x.html": "cannot be written: Not a directory",
        "--output=x.html": "workdir",
    }
    for flags, words in wrong.items():
        assert report.main(["report", *flags.split(" ")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert (words in error, error.count("\n")) == (True, 1), error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_report_of_a_replaced_run_goes(run):
    RunDirectory(run, None).begin()
    assert not (run / "report.html").exists()
    assert not (run / "layers.json").exists()


PROBE = """
const found = {errors: []};
addEventListener("error", (event) => found.errors.push(event.message));
addEventListener("load", () => {
  const cells = (column) => [...document.querySelectorAll("#layers-table tbody tr")].map(
    (row) => row.cells[column].textContent);
  const heads = [...document.querySelectorAll("#layers-table thead button")];
  const column = heads.findIndex((head) => head.textContent === "error");
  const before = cells(column);
  heads[column].focus();
  found.focused = document.activeElement === heads[column];
  heads[column].click();
  found.up = cells(column);
  found.state = heads[column].parentElement.getAttribute("aria-sort");
  heads[column].click();
  found.down = cells(column);
  found.before = before;
  heads[0].click();
  found.names = cells(0);
  found.over = document.documentElement.scrollWidth;
  const boxes = [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect());
  found.pictures = boxes.map((box) => [box.width, box.height]);
  parent.document.body.dataset[`at${innerWidth}`] = JSON.stringify(found);
});
"""


@pytest.fixture
def in_browser(finished_run, tmp_path):
    """What the probe found in the page at every width: in frames, as windows are 500 wide."""
    page = (finished_run / "report.html").read_text()
    page = html.escape(page.replace("<head>", f"<head><script>{PROBE}</script>", 1))
    frames = [f'<iframe srcdoc="{page}" width="{w}" height="900"></iframe>' for w in WIDTHS]
    style = "<style>iframe { border: 0 }</style>"
    (tmp_path / "frames.html").write_text(f"<!DOCTYPE html>{style}<body>{''.join(frames)}")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=2000,1000", "--dump-dom",
         (tmp_path / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = {w: re.search(rf'data-at{w}="([^"]*)"', done.stdout) for w in WIDTHS}
    return {w: json.loads(html.unescape(match[1])) for w, match in found.items()}


@pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")
def test_the_page_in_a_browser(in_browser, finished_run):
    pictures = (finished_run / "report.html").read_text().count("<svg")
    for width, found in in_browser.items():
        assert found["errors"] == []
        assert found["focused"]
        values = [float(value) for value in found["up"]]
        assert values == sorted(values)
        assert (found["up"], found["state"]) == (found["down"][::-1], "ascending")
        assert found["before"] not in (found["up"], found["down"])
        assert found["names"] == sorted(found["names"])
        assert found["over"] <= width  # only tables scroll sideways
        assert len(found["pictures"]) == pictures
        assert all(100 < w <= width and h > 50 for w, h in found["pictures"])


def test_names_that_tell_workdirs_apart(tmp_path):
    assert reports._names(tmp_path / "a" / "x", tmp_path / "b" / "x") == ["a/x", "b/x"]
