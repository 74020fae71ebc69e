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
from launch.lib import allocation_inputs, command_line, experiment


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    flags.DEFINE_string("config", None, "file.py:variant; required", flag_values=values)
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/ and weights/")
    allocation_inputs.define_flags(values)
    timing.define_out(values)
    flags.mark_flag_as_required("config", flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Measures and reports."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    config = command_line.load_config(values.config, overrides)
    recipe = experiment.recipe_of(config)
    choices = allocation_inputs.parse_choices(values.weight_bits, values.act_bits, values.borders)
    apply, variables, calibration = allocation_inputs.open_network(config, values.data_dir, 0)
    latencies = aq.layer_latencies(
        apply, variables, calibration, choices,
        recipe=recipe, mask=config.get("mask"), compiler=aq.Compiler(gpu_ops.backend()),
    )  # fmt: skip
    timing.report({
        "benchmark": "layers", "config": values.config, "choices": list(map(str, choices)),
        allocation_inputs.LATENCIES: latencies, **environment(),
    }, values.out)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
