"""Quantizes the network of a config and scores it.

Writes results.json, report.html, log.jsonl, plots/, blocks and the network (quantized/) into the
workdir. A finished run is not repeated. Rerunning an interrupted one resumes after its last block,
with the same bits. Any field of the config: --config.recipe.reconstruction.steps=100.

Example:

    python -m launch.quantize --config=configs/digits.py:w2a2,preset=aquant --workdir=runs/x
"""

import dataclasses
import sys

from absl import flags

from launch.lib import (
    allocations,
    command_line,
    experiment,
    hosts,
    memory_limits,
    meshes,
    reports,
)
from launch.lib.results import one_line
from launch.lib.run_directory import PAGE


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("config", None, "file.py:variant; required", flag_values=values)
    command_line.define_path(values, "workdir", None, "folder to write into; required")
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/ and weights/")
    text = "of launch.allocate; its bits and borders replace the config's"
    command_line.define_path(values, "allocation", None, text)
    flags.DEFINE_integer("seed", 0, "of calibration draw and steps", 0, flag_values=values)
    flags.DEFINE_integer(
        "restart_from_block", None,
        "re-optimise this block and all later ones, perhaps with another recipe.reconstruction; "
        "if that is interrupted, resume without this flag", 0, flag_values=values,
    )  # fmt: skip
    meshes.define_flag(values)
    memory_limits.define_flag(values)
    hosts.define_flags(values)
    flags.mark_flags_as_required(["config", "workdir"], flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Runs one cell."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    hosts.join(values)
    config = command_line.load_config(values.config, overrides)
    origin = allocations.use(config, values.allocation) if values.allocation else {}
    experiment.recipe_of(config)  # a wrong field ends the run here, before anything is loaded
    mesh, limit = meshes.parse(values.mesh), memory_limits.parse(values.memory_limit)
    identity = experiment.identity(config, values.seed, values.data_dir)
    first = values.restart_from_block
    with hosts.claim(values.workdir, identity, restart=first is not None) as directory:
        results = directory.stored
        if results is None:
            loaded = experiment.load(config, values.data_dir, mesh, limit)
            loaded = dataclasses.replace(loaded, origin=origin)
            results = experiment.run(
                loaded, config, values.config, values.seed, directory, restart_from=first
            )
        elif hosts.is_first() and not (directory.path / PAGE).exists():
            reports.write_report(directory.path)
    print(one_line(results, directory.path))
    print(f"in {directory.path}")


if __name__ == "__main__":
    sys.exit(main())
