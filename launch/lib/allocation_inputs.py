"""What launch.allocate and launch.bench.layers share: flags, the network, the latencies."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

import aquant_jax as aq
from aquant_jax.allocation.costs import check_latencies
from aquant_jax.arithmetic.uniform import MAX_BITS, MIN_BITS
from aquant_jax.errors import InputError, reason
from aquant_jax.storage.json_file import read_json
from launch.lib import experiment
from launch.lib.command_line import Config

FLOAT_BITS = 16
LATENCIES = "latencies"


def define_flags(values: flags.FlagValues) -> None:
    """The flags --weight_bits, --act_bits and --borders."""
    flags.DEFINE_list("weight_bits", "2,3,4", "to choose from", flag_values=values)
    flags.DEFINE_list("act_bits", "2,3,4", "to choose from", flag_values=values)
    text = "to choose from, name:granularity; launch.allocate needs --steps; empty: the recipe's"
    flags.DEFINE_list("borders", "", text, flag_values=values)


def open_network(config: Config, data_dir: str, seed: int) -> tuple[Callable, Any, Any]:
    """The network's inference function, its variables, and the inputs of the calibration set.

    Raises:
        InputError: see `experiment.open_data` and `experiment.create`; the network does not take
            the inputs.
    """
    dataset, source = experiment.open_data(config, data_dir)
    apply, variables, check = experiment.create(config, data_dir, dataset)
    corrupt = experiment.on_corrupt(config, [])
    calibration = source.calibration(config.calibration_size, seed, corrupt).inputs
    check(calibration)
    return apply, variables, calibration


def read_latencies(path: str | None) -> dict[str, dict[str, float]] | None:
    """The milliseconds in a file of ``launch.bench.layers``, by weight path and choice.

    Raises:
        InputError: the file cannot be read, or holds no such table.
    """
    if path is None:
        return None
    try:
        content = read_json(Path(path))
    except OSError as error:
        raise InputError(f"--latencies={path} cannot be read: {reason(error)}") from error
    except InputError as error:
        raise InputError(f"--latencies={error}") from error
    if not isinstance(content, dict) or LATENCIES not in content:
        raise InputError(f"--latencies={path} holds no milliseconds of layers by choice")
    check_latencies(content[LATENCIES], f"--latencies={path}")
    return content[LATENCIES]


def parse_choices(
    weight_bits: Sequence[str], act_bits: Sequence[str], borders: Sequence[str]
) -> list[aq.Choice]:
    """All choices of these bits and borders.

    >>> [str(choice) for choice in parse_choices(["4", "16"], ["4", "16"], [])]
    ['w4a4', 'w4a16', 'float']

    Raises:
        InputError: no bits, or some that are no number or out of range; an unknown border.
    """
    weights, acts = _bits("weight_bits", weight_bits), _bits("act_bits", act_bits)
    kinds: list[Any] = [_border(border) for border in borders] or [()]
    found = []
    for weight, act in itertools.product(weights, acts):
        if weight is None:
            found.append(aq.Choice())
        else:
            found += [aq.Choice(weight, act, *(kind if act else ())) for kind in kinds]
    return list(dict.fromkeys(found))


def _border(text: str) -> list[str]:
    kind = text.split(":")
    if len(kind) > 2 or "" in kind:
        raise InputError(f"--borders has {text!r}; give name or name:granularity")
    try:
        aq.Choice(MIN_BITS, MIN_BITS, *kind)
    except InputError as error:
        raise InputError(f"--borders has {text!r}; {error}") from error
    return kind


def _bits(flag: str, texts: Sequence[str]) -> list[int | None]:
    wanted = f"give a list of 2 to 8, such as 2,3,4, or {FLOAT_BITS} for float"
    if not texts:
        raise InputError(f"--{flag} is empty; {wanted}")
    known = {str(bits): bits for bits in range(MIN_BITS, MAX_BITS + 1)} | {str(FLOAT_BITS): None}
    for text in texts:
        if text.strip() not in known:
            raise InputError(f"--{flag} has {text!r}; {wanted}")
    return [known[text.strip()] for text in texts]
