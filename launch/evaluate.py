"""Scores a saved network on the test set of a config, without the model's code or weights.

Example:

    python -m launch.evaluate --config=configs/digits.py --checkpoint=runs/x/quantized
"""

import sys

from absl import flags
from jax.sharding import Mesh

import aquant_jax as aq
from aquant_jax import data
from aquant_jax.reporting.run import metric_name
from launch.lib import command_line, experiment, hosts, meshes
from launch.lib.metrics import compare_batches, float_network


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this program."""
    names = "names the data set, file.py:variant; required"
    flags.DEFINE_string("config", None, names, flag_values=values)
    command_line.define_path(values, "checkpoint", None, "folder of aq.save; required")
    command_line.define_path(values, "data_dir", "~", "holds tensorflow_datasets/")
    text = "compare with the config's float network too; it needs no labels"
    flags.DEFINE_boolean("against_float", False, text, flag_values=values)
    meshes.define_flag(values)
    hosts.define_flags(values)
    flags.mark_flags_as_required(["config", "checkpoint"], flag_values=values)


@command_line.program
def main(argv: list[str]) -> None:
    """Restores, scores and prints."""
    values, overrides = command_line.parse(argv, define_flags, __doc__)
    hosts.join(values)
    config = command_line.load_config(values.config, overrides)
    mesh = meshes.parse(values.mesh)
    dataset, _ = experiment.open_data(config, values.data_dir)
    quantized = aq.restore(values.checkpoint)
    metrics = experiment.score(quantized, dataset, config, "saved", mesh=mesh)
    name = metric_name(dataset.metric)
    samples = metrics["samples"]
    print(f"{values.checkpoint}: {metrics[dataset.metric]:.2f}% {name} of {samples:.0f} samples")
    if values.against_float:
        print(_compared(quantized, dataset, config, values.data_dir, mesh))
    aq.summary(quantized)


def _compared(
    quantized: aq.Quantized,
    dataset: data.Dataset,
    config: command_line.Config,
    data_dir: str,
    mesh: Mesh | None,
) -> str:
    """A line about the classes of a network and of the float network of a config."""
    apply, variables, _ = experiment.create(config, data_dir, dataset)
    reference = float_network(apply, variables, config.model, dataset.name)
    skip = experiment.on_corrupt(config, [])
    batches = dataset.batches(config.eval_batch_size, config.test_limit, skip)
    found = compare_batches(reference, quantized, batches, mesh)
    return (
        f"the class of the float network for {found['agreement']:.2f}% of {found['samples']:.0f} "
        f"samples; divergence {found['divergence']:.4f} nats"
    )


if __name__ == "__main__":
    sys.exit(main())
