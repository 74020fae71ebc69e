"""Times every layer of a config's network at every choice, for launch.allocate --latencies.

Each layer runs alone on one sample, deployed with codes rounded to nearest, from a float input;
the time is the least of five rounds. Run this where the network will run, and launch.allocate
anywhere. Bits of 16 stand for float.

Example:

    python -m launch.bench.layers --config=configs/digits.py:w3a3 --out=latencies.json
"""

import sys

from absl import flags

import aquant_jax as aq
import gpu_ops
from aquant_jax.storage.environment import environment
from launch.bench import timing
from launch.lib import choice_flags, command_line, experiment


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("config", None, "file.py:variant; required", flag_values=values)
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/ and weights/")
    choice_flags.define_flags(values)
    timing.define_out(values)
    flags.mark_flag_as_required("config", flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    config = command_line.load_config(values.config, overrides)
    recipe, choices = (
        experiment.recipe_of(config),
        choice_flags.parse_choices(values.weight_bits, values.act_bits, values.borders),
    )
    dataset, source = experiment.open_data(config, values.data_dir)
    apply, variables, check = experiment.create(config, values.data_dir, dataset)
    corrupt = experiment.on_corrupt(config, [])
    calibration = source.calibration(config.calibration_size, 0, corrupt).inputs
    check(calibration)
    latencies = aq.layer_latencies(
        apply, variables, calibration, choices,
        recipe=recipe, mask=config.get("mask"), compiler=aq.Compiler(gpu_ops.backend()),
    )  # fmt: skip
    timing.report({
        "benchmark": "layers", "config": values.config, "choices": list(map(str, choices)),
        choice_flags.LATENCIES: latencies, **environment(),
    }, values.out)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
