"""What the launchers share: flags, config files, and user errors as one line.

Flags live in a ``FlagValues`` of each call, not in absl's global one, so a test can run a
whole program in its own process, as often as it likes.
"""

import ast
import functools
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from aquant_jax.errors import InputError, ReconstructionError
from launch.lib.process import keep_freed_memory

FAILED_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
Config = Any  # a ConfigDict, whose fields no type checker knows

_OVERRIDE = re.compile(r"--?config\.([\w.]+)(?:=(.*))?$", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}


def program(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Makes a main that takes ``argv`` return an exit code, and sets the process up for speed.

    An ``InputError`` or a wrong flag is printed as one line and returns 2, a reconstruction
    that failed 1. Anything else is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        keep_freed_memory()
        try:
            return main(sys.argv if argv is None else argv) or 0
        except (InputError, ReconstructionError, flags.Error) as error:
            message = " ".join(str(error).split())
            print(f"error: {message}", file=sys.stderr)
            failed = isinstance(error, ReconstructionError)
            return FAILED_EXIT_CODE if failed else USER_ERROR_EXIT_CODE

    return wrapped


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None], description: str | None
) -> tuple[Any, dict[str, str]]:
    """Parses a command line.

    Args:
        argv: the program's name and its arguments.
        define: defines the flags of the program.
        description: printed by --help.

    Returns:
        The flags, and the ``--config.FIELD=VALUE`` overrides as ``{FIELD: VALUE}``.

    Raises:
        flags.Error: an unknown flag or a value of the wrong type.
        InputError: a stray argument, or an override without a value.
    """
    rest, overrides = split_overrides(argv)
    values = flags.FlagValues()
    define(values)
    if {"--help", "-help", "-h"} & set(rest):
        print(description or "", values.get_help(), sep="\n")
        sys.exit(0)
    stray = values(rest)[1:]
    if stray:
        raise InputError(f"unexpected argument {stray[0]!r}; flags look like --name=value")
    return values, overrides


def absolute(folder: str) -> str:
    """A folder as it identifies a run, whatever the current one."""
    return str(Path(folder).expanduser().resolve())


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes ``--config.FIELD=VALUE`` and ``--config.FIELD VALUE`` out of ``argv``."""
    rest, overrides = [], {}
    arguments = iter(argv)
    for argument in arguments:
        match = _OVERRIDE.match(argument)
        if match is None:
            rest.append(argument)
            continue
        value = match[2] if match[2] is not None else next(arguments, None)
        if value is None:
            raise InputError(f"{argument} lacks a value")
        overrides[match[1]] = value
    return rest, overrides


def load_config(spec: str, overrides: dict[str, str], variant: str = "") -> Config:
    """Runs a config file.

    Args:
        spec: ``path/to/config.py`` or ``path/to/config.py:variant``.
        overrides: field path -> value as text.
        variant: appended to the variant of ``spec``, after a comma.

    Returns:
        What its ``get_config(variant)`` returns, with the overrides.

    Raises:
        InputError: no such file, variant or field, or a value of another type.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise InputError(f"there is no config file {path!r}")
    try:
        get_config = runpy.run_path(path).get("get_config")
    except SyntaxError as error:
        raise InputError(f"{path} is no Python file: {error}") from error
    if get_config is None:
        raise InputError(f"{path} defines no get_config(variant)")
    if "preset" in overrides:
        # The other fields would stay those of the preset that the variant names.
        raise InputError(f"name the preset in the variant: {spec},preset={overrides['preset']}")
    config = get_config(",".join(part for part in (argument, variant) if part))
    for field, text in overrides.items():
        _override(config, field, text)
    return config


def _override(config: ConfigDict, field: str, text: str) -> None:
    *parents, leaf = field.split(".")
    node: Any = config
    for parent in parents:
        node = node[parent] if isinstance(node, ConfigDict) and parent in node else None
    if not isinstance(node, ConfigDict) or leaf not in node:
        there = node if isinstance(node, ConfigDict) else config
        raise InputError(f"config has no field {field!r}; there are {', '.join(sorted(there))}")
    try:
        node[leaf] = _value(text, node[leaf])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"config field {field} is {node[leaf]!r} and cannot become {text!r}: {error}"
        ) from error


def _value(text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(old, bool) != isinstance(value, bool) and old is not None:
        raise TypeError("it is a yes or no" if isinstance(old, bool) else "it is no yes or no")
    return value
