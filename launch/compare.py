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
from aquant_jax.errors import InputError
from aquant_jax.storage.environment import environment
from configs import variants
from launch.lib import cells, command_line, experiment, plots, run_directory

ROWS = [*variants.PRESETS[1:], variants.PRESETS[0]]  # ours last


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("config", None, "config file, file.py:variant", flag_values=values)
    flags.DEFINE_list("presets", ROWS, "rows", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "seeds of every row", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder to write into", flag_values=values)
    flags.DEFINE_string(
        "data_dir", "~", "holds tensorflow_datasets/ and weights/", flag_values=values
    )
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


def row(preset: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the runs of a preset."""
    scores = [cell["quantized"][cell["metric"]] for cell in runs]
    return {
        "preset": preset,
        "metric": runs[0]["metric"],
        "weight_bits": runs[0]["weight_bits"],
        "act_bits": runs[0]["act_bits"],
        "seeds": {str(cell["seed"]): cell["quantized"] for cell in runs},
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else None,
        "float": runs[0]["float"][runs[0]["metric"]],
        "seconds": statistics.fmean(cell["seconds"] for cell in runs),
        "devices": sorted({cell["device"] for cell in runs}),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    metric = rows[0]["metric"]
    name = experiment.METRIC_NAMES.get(metric, metric)
    lines = [
        f"| preset | bits | {name} % | float % | drop | seeds | seconds a run |",
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


@command_line.program
def main(argv: list[str]) -> None:
    """Runs every cell that is not finished, then writes the table."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    seeds = cells.parse_seeds(values.seeds)
    wanted = [
        cells.Cell(
            name,
            f"{values.config},preset={name}",
            cells.load_config(values.config, overrides, f"preset={name}"),
        )
        for name in dict.fromkeys(values.presets)
    ]
    if not wanted:
        raise InputError(f"no presets; there are: {', '.join(aq.recipes.PRESETS)}")
    owner = {"program": "compare", "config": values.config, "overrides": overrides}
    with run_directory.claim(values.workdir, owner) as folder:
        found = cells.run(folder.path, values.data_dir, wanted, seeds)
        rows = [row(name, of_preset) for name, of_preset in found.items()]
        plots.comparison_plots(found, folder.plots)
        results = {"config": values.config, "rows": rows, "table": table(rows)}
        folder.finish(results | environment())
    print(f"\n{table(rows)}\n\nin {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
