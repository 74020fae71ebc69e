"""The value of ``--memory_limit``: the memory that a run may use."""

import math
import re

from absl import flags

from aquant_jax.errors import InputError

UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def define_flag(values: flags.FlagValues) -> None:
    """Defines ``--memory_limit``."""
    text = "to use at most, such as 4GiB; what does not fit lies in files of the workdir"
    flags.DEFINE_string("memory_limit", None, text, flag_values=values)


def parse(text: str | None) -> int | None:
    """The bytes of a value of ``--memory_limit``.

    Raises:
        InputError: it is no positive size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text, re.ASCII)
    size = float(match[1]) * UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < math.inf:
        raise InputError(f"--memory_limit={text}: it must be a size, such as 4GiB or 500MB")
    return int(size)
