"""Quantizes the network of a config by several presets and prints one table.

    python -m launch.compare --config=configs/digits.py:w2a2 \\
        --presets=nearest,adaround,brecq,qdrop,aquant --seeds=0,1,2 --workdir=runs/compare

Each (preset, seed) is a run of its own in workdir/PRESET-sSEED; finished ones are not
repeated, so an interrupted comparison goes on where it stopped, and seeds can be added.
"""

import statistics
import sys
from typing import Any

from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax import plots, workdir
from aquant_jax.errors import InputError
from launch import common, experiment


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("config", None, "config file, file.py:variant", flag_values=values)
    flags.DEFINE_list("presets", list(aq.recipes.PRESETS), "rows", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "seeds of every row", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder to write into", flag_values=values)
    flags.DEFINE_string(
        "data_dir", "~", "holds tensorflow_datasets/ and weights/", flag_values=values
    )
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


def parse_seeds(texts: list[str]) -> list[int]:
    """Reads ``--seeds``; raises ``InputError`` for anything but different whole numbers."""
    if not texts or not all(text.strip().isdecimal() for text in texts):
        raise InputError(f"seeds must be whole numbers such as 0,1,2, not {','.join(texts)!r}")
    return list(dict.fromkeys(int(text) for text in texts))


def load_config(spec: str, overrides: dict[str, str], preset: str) -> common.Config:
    """Loads the config of one row; a preset without steps (nearest) stays without any."""
    plain = common.load_config(spec, {}, f"preset={preset}")
    if plain.recipe.steps == 0:
        overrides = {field: text for field, text in overrides.items() if field != "recipe.steps"}
    return common.load_config(spec, overrides, f"preset={preset}")


def row(preset: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the cells of a preset."""
    scores = [cell["quantized"]["top1"] for cell in cells]
    return {
        "preset": preset,
        "weight_bits": cells[0]["weight_bits"],
        "act_bits": cells[0]["act_bits"],
        "seeds": {str(cell["seed"]): cell["quantized"] for cell in cells},
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "float": cells[0]["float"]["top1"],
        "seconds": statistics.fmean(cell["seconds"] for cell in cells),
        "devices": sorted({cell["device"] for cell in cells}),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| preset | bits | top-1 % | float % | drop | seeds | seconds a run |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in rows:
        spread = "" if entry["std"] is None else f" ± {entry['std']:.2f}"
        lines.append(
            f"| {entry['preset']} | w{entry['weight_bits']}a{entry['act_bits']} "
            f"| {entry['mean']:.2f}{spread} | {entry['float']:.2f} "
            f"| {entry['float'] - entry['mean']:.2f} | {len(entry['seeds'])} "
            f"| {entry['seconds']:.0f} |"
        )
    return "\n".join(lines)


def run_cells(
    folder: workdir.Run, values: Any, configs: dict[str, common.Config], seeds: list[int]
) -> dict[str, list[dict[str, Any]]]:
    """Runs the cells that are not finished; returns the results of all, by preset."""
    loaded: experiment.Experiment | None = None
    cells: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for name, config in configs.items():
        compiler = aq.Compiler(gpu_ops.backend())
        for seed in seeds:
            path = folder.path / f"{name}-s{seed}"
            with workdir.claim(path, experiment.identity(config, seed)) as cell:
                results = cell.stored
                if results is None:
                    loaded = loaded or experiment.load(config, values.data_dir)
                    spec = f"{values.config},preset={name}"
                    results = experiment.run(loaded, config, spec, seed, cell, compiler)
            print(experiment.one_line(results), flush=True)
            cells[name].append(results)
    return cells


@common.program
def main(argv: list[str]) -> None:
    """Runs every cell that is not finished, then writes the table."""
    values, overrides = common.parse(argv, define_flags, __doc__)
    seeds = parse_seeds(values.seeds)
    configs = {
        name: load_config(values.config, overrides, name) for name in dict.fromkeys(values.presets)
    }
    for config in configs.values():
        experiment.recipe_of(config)
    owner = {"program": "compare", "config": values.config, "overrides": overrides}
    with workdir.claim(values.workdir, owner) as folder:
        cells = run_cells(folder, values, configs, seeds)
        rows = [row(name, of_preset) for name, of_preset in cells.items()]
        plots.comparison_plots(cells, folder.plots)
        results = {"config": values.config, "rows": rows, "table": table(rows)}
        folder.finish(results | experiment.environment())
    print(f"\n{table(rows)}\n\nin {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
