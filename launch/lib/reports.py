"""The report of a workdir: one HTML file of what its files hold."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import aquant_jax as aq
from aquant_jax.allocation.measure import FILE as MEASURED
from aquant_jax.errors import InputError
from aquant_jax.plan.network import take_samples
from aquant_jax.reporting import svg
from aquant_jax.reporting.layers import Record, layer_records
from aquant_jax.reporting.page import page
from aquant_jax.reporting.report import write
from aquant_jax.reporting.run import Run
from aquant_jax.storage.json_file import jsonable, read_json, write_json
from aquant_jax.storage.parsing import malformed
from launch.lib import allocations
from launch.lib.paper_tables import cell_name
from launch.lib.run_directory import IDENTITY, LAYERS, LOG, NETWORK, PAGE, RESULTS, finished

SAMPLES = 16  # for the histograms of activations
SHOWN = ("preset", "weight_bits", "act_bits", "recipe", "seconds", "seed", "blocks", "metric")
NO_REPORT = "launch.report knows runs of launch.quantize, launch.sweep and launch.allocate"


def measure(quantized: aq.Quantized, inputs: Any, variables: Any, path: Path) -> None:
    """Writes what a report shows of the layers, which only the finished network tells."""
    few = jax.tree.map(lambda leaf: take_samples(leaf, slice(SAMPLES)), inputs)
    write_json(path / LAYERS, layer_records(quantized, few, variables))


def write_report(path: Path, output: Path | None = None, against: Path | None = None) -> Path:
    """Writes the report of a finished run or sweep.

    Args:
        path: its workdir.
        output: file to write; report.html in the workdir if it is None.
        against: another workdir, whose runs are shown beside.

    Returns:
        The file.

    Raises:
        InputError: a workdir holds no finished run or one of another program; the file cannot be
            written; matplotlib is not installed.
    """
    runs, title, command = read(path)
    if against is not None:
        others, other, _ = read(against)
        both = _names(path, against)
        runs = [*_renamed(runs, both[0]), *_renamed(others, both[1])]
        title, command = f"{title} against {other}", None
    file = output or path / PAGE
    svg.matplotlib()  # its absence is no fault of the files
    with malformed(Path(f"{path} or {against}") if against else path):
        text = page(runs, title, command)
    write(file, text)
    return file


def read(path: Path) -> tuple[list[Run], str, str | None]:
    """The runs of a workdir, a title and the command that made it.

    Raises:
        InputError: see `write_report`.
    """
    ours = any((path / name).is_file() for name in (allocations.FILE, MEASURED))
    if ours and not (path / IDENTITY).is_file():
        return _allocated(path)
    program = finished(path).get("program")
    if program == "quantize":
        results = _results(path, SHOWN)
        run = _run(path, results["preset"])._replace(layers=_layers(path))
        with malformed(path / RESULTS):
            title = f"{run.name} {run.bits}, seed {results['seed']}"
        return [run], title, results.get("command")
    if program != "sweep":
        raise InputError(f"{path} holds a run of launch.{program}: {NO_REPORT}")
    results = _results(path, ())
    runs = [
        _run(path / name, name)._replace(layers=(), link=f"{name}/{PAGE}", group=group)
        for name, group in _cells(path, results)
    ]
    name = results["config"] if "rows" in results else f"Table {results['table']} of the paper"
    return runs, f"Presets on {name}" if "rows" in results else name, results.get("command")


def _allocated(path: Path) -> tuple[list[Run], str, str | None]:
    """What `read` returns, of a workdir of launch.allocate, which has no identity."""
    if not (path / allocations.FILE).is_file():
        raise InputError(f"{path} holds no finished allocation: no {allocations.FILE} is in it")
    results = _results(path, ("config", "budget", "seconds"))
    with malformed(path / allocations.FILE):
        allocation = aq.Allocation.load(path / allocations.FILE)
        found = allocations.points(allocation)
    recipe = allocation.recipe
    fields = {name: getattr(recipe, name) for name in ("preset", "weight_bits", "act_bits")}
    fields |= {"recipe": recipe.to_dict(), "blocks": []}
    title = f"Allocation of {results['config']}, {results['budget']}"
    return [Run("allocation", results | fields | found, {})], title, results.get("command")


def _cells(path: Path, results: dict[str, Any]) -> list[tuple[str, str]]:
    """The folders of the finished runs of a sweep, in the order of its table, and their cells."""
    if "rows" in results:
        names = [row["preset"] for row in results["rows"]]
    else:
        names = [f"{c['model']}/{cell_name(c['bits'], c['row'])}" for c in results["cells"]]
    found = [
        (str(folder.relative_to(path)), name)
        for name in names
        for folder in sorted(path.glob(f"{name}-s[0-9]*"))
        if (folder / RESULTS).is_file() and (folder / IDENTITY).is_file()
    ]
    if not found:
        raise InputError(f"{path} holds a sweep, but none of its runs")
    return found


def _run(path: Path, name: str) -> Run:
    """The run of a workdir, without its layers."""
    return Run(name, _results(path, SHOWN), _curves(path / LOG))


def _results(path: Path, fields: Sequence[str]) -> dict[str, Any]:
    """The results in a workdir, which must have these fields."""
    results = read_json(path / RESULTS)
    if not isinstance(results, dict) or (missing := sorted(set(fields) - results.keys())):
        lacks = f"lacks {', '.join(missing)}" if isinstance(results, dict) else "holds no object"
        raise InputError(f"{path / RESULTS} is damaged: it {lacks}")
    return results


def _curves(log: Path) -> dict[int, Any]:
    with malformed(log):
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        reports = [json.loads(line) for line in lines]
        return {report["index"]: report["loss_curve"] for report in reports}


def _layers(path: Path) -> list[Record]:
    """Those that the run measured, or else those of its network."""
    if (path / LAYERS).is_file():
        return read_json(path / LAYERS)
    if not (path / NETWORK).is_dir():
        return []
    return jsonable(layer_records(aq.restore(path / NETWORK)))


def _names(*paths: Path) -> list[str]:
    """Short names that tell paths apart: the end of each, as long as necessary."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _renamed(runs: Sequence[Run], name: str) -> list[Run]:
    """The runs of a workdir beside those of another one."""
    if len(runs) == 1:
        return [runs[0]._replace(name=name, link=None, group=None)]
    return [
        run._replace(name=f"{name}: {run.name}", link=None, group=f"{name}: {run.label}")
        for run in runs
    ]
