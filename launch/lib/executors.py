"""Where the cells of a sweep run: one after another in this process, or on a Ray cluster."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from aquant_jax.errors import InputError
from launch.lib import cells, command_line, memory_limits, meshes, process, ray_cluster

LOCAL, RAY = "local", "ray"
OF_RAY = ("cpus_per_cell", "gpus_per_cell", "ray_address")  # flags
# The cells of each network by the folder that their runs lie in, and their results.
Planned = dict[Path, list[cells.Cell]]
Executor = Callable[[Planned], dict[Path, cells.Results]]


def define_flags(values: flags.FlagValues) -> None:
    """Defines ``--executor`` and those that belong to it."""
    flags.DEFINE_enum("executor", LOCAL, [LOCAL, RAY], "where cells run", flag_values=values)
    for name, least, text in (
        ("cpus_per_cell", 1, "CPUs of a run; 1 by default"),
        ("gpus_per_cell", 0, "its GPUs; by default those of --mesh, where the cluster has any"),
    ):
        flags.DEFINE_integer(name, None, f"with ray: {text}", least, flag_values=values)
    text = "with ray: host:port of a cluster, or auto; by default RAY_ADDRESS, or this machine"
    flags.DEFINE_string("ray_address", None, text, flag_values=values)


def create(values: Any) -> Executor:
    """The executor that the flags ask for.

    Args:
        values: the flags of ``launch.sweep``, with those of `define_flags`.

    Raises:
        InputError: flags that do not belong together, a mesh that cannot be made, or no Ray.
    """
    limit = memory_limits.parse(values.memory_limit)
    seeds, data_dir = cells.parse_seeds(values.seeds), command_line.absolute(values.data_dir)
    if values.executor == RAY:
        address, cpus = ray_cluster.find_address(values.ray_address), values.cpus_per_cell or 1
        gpus, command = values.gpus_per_cell, process.command()
        tasks = ray_cluster.Tasks(address, cpus, gpus, values.mesh, data_dir, limit, command)
        ray_cluster.check(tasks)
        return lambda planned: ray_cluster.run(tasks, planned, seeds)
    for name in OF_RAY:
        if values[name].value is not None:
            raise InputError(f"--{name} belongs to --executor={RAY}")
    mesh = meshes.parse(values.mesh)
    return lambda planned: {
        folder: cells.run(folder, data_dir, of_network, seeds, mesh, limit)
        for folder, of_network in planned.items()
    }
