"""The value of ``--mesh``: the devices that a run splits its samples over."""

import re

import jax
from absl import flags
from jax.sharding import AxisType, Mesh

from aquant_jax.errors import InputError
from aquant_jax.reconstruction.devices import DATA, MODEL

AUTO = "auto"


def define_flag(values: flags.FlagValues) -> None:
    """Defines ``--mesh``."""
    text = "devices: N to split samples over, NxM for weights too, auto for all"
    flags.DEFINE_string("mesh", None, text, flag_values=values)


def sizes(text: str) -> tuple[int, int] | None:
    """The devices for samples and for weights that a value of ``--mesh`` names; None for ``auto``.

    Raises:
        InputError: neither ``auto`` nor sizes.
    """
    if text == AUTO:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise InputError(f"--mesh={text}: it must be a number, {AUTO}, or NxM, such as 4 or 4x2")
    return int(match[1]), int(match[2] or 1)


def parse(text: str | None) -> Mesh | None:
    """The mesh of a value of ``--mesh``; None for one device. Several processes have one mesh.

    Raises:
        InputError: neither ``auto`` nor sizes, or more devices than JAX has; fewer than those of
            several processes.
    """
    several = jax.distributed.is_initialized()
    if text is None:
        if not several:
            return None
        text = AUTO
    found = jax.device_count()
    samples, weights = sizes(text) or (found, 1)
    if samples * weights > found:
        raise InputError(
            f"--mesh={text} needs {samples * weights} devices, and JAX has {found} "
            f"({jax.default_backend()}); JAX_NUM_CPU_DEVICES sets how many a CPU counts for"
        )
    if several and samples * weights < found:
        raise InputError(
            f"--mesh={text} has {samples * weights} devices; the {jax.process_count()} processes "
            f"have {found}, and their mesh must have all of them"
        )
    if samples * weights == 1:
        return None
    devices = jax.devices()[: samples * weights]
    automatic = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((samples, weights), (DATA, MODEL), automatic, devices=devices)
