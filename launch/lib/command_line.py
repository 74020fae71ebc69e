"""Common parts of the launchers: flags, config files, --help, and user errors as one line.

Flags live in a ``FlagValues`` of each call, not in absl's global one, so a test can run a whole
program in its own process, as often as it likes.

``config_flags`` of ml_collections parses the fields of a config that flags set. It does not read
the files: in one process it keeps the module of the first file, so that a second file without
``get_config`` runs the first one's, and errors of a file arrive late, as tracebacks, or on several
lines. Nor can it set a field that is None, or set one to None.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from aquant_jax.errors import InputError, ReconstructionError, reason
from aquant_jax.recipe import PRESETS, Recipe, Reconstruction
from aquant_jax.recipe_checks import RENAMED, hint
from launch.lib import hosts, process
from launch.lib.help_text import help_text

FAILED_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130  # as shells have it: 128 and the number of SIGINT
TRACEBACK = "--traceback"  # a flag of every program: errors keep their traceback
RECONSTRUCTION = tuple(field.name for field in dataclasses.fields(Reconstruction))
RECIPE = tuple(field.name for field in dataclasses.fields(Recipe))
REQUIRED = (
    *("model", "weights", "dataset", "calibration_size", "test_limit", "eval_batch_size"),
    *("preset", "recipe"),
)  # fields of every config
Config = Any  # a ConfigDict, whose fields no type checker knows

_OVERRIDE = re.compile(r"--?config\.([\w.]+)(?:=(.*))?$", re.DOTALL)
_HELP = {"--help", "-help", "-h"}


def program(main: Callable[[list[str]], int | None]) -> Callable[..., int]:
    """Makes a main that takes ``argv`` return an exit code, and sets the process up for speed.

    Every error is printed as one line. An ``InputError``, a wrong flag or an error of the system
    (a file that cannot be read, say) returns 2, Ctrl-C 130. A reconstruction that failed returns 1,
    and so does anything else, which is a bug of ours: --traceback shows where it is.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        process.keep_freed_memory()
        process.keep_compiled_programs()
        arguments = list(sys.argv if argv is None else argv)
        process.remember_command(main.__module__, arguments[1:])
        show = TRACEBACK in arguments
        try:
            with process.flushed_output(), process.progress_on_stderr(), process.interruptible():
                code = main([text for text in arguments if text != TRACEBACK]) or 0
        except (Exception, KeyboardInterrupt) as error:
            if show and not hosts.connected():
                raise
            code, message = _outcome(error)
            message = " ".join(message.split())
            if hosts.connected():
                if show:
                    traceback.print_exc()
                hosts.fail(code, error, message)
            print(f"error: {message}", file=sys.stderr)
            return code
        if hosts.connected():
            hosts.leave(code)
        return code

    return wrapped


def _outcome(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, InputError | flags.Error):
        return USER_ERROR_EXIT_CODE, str(error)
    if isinstance(error, ReconstructionError):
        return FAILED_EXIT_CODE, str(error)
    if isinstance(error, MemoryError):
        return USER_ERROR_EXIT_CODE, f"not enough memory: {reason(error)}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED_EXIT_CODE, "interrupted; the same command goes on where it can resume"
    if isinstance(error, BrokenPipeError):
        return USER_ERROR_EXIT_CODE, f"{process.OUTPUT}: {reason(error)}"
    if isinstance(error, OSError) and error.filename is not None:
        return USER_ERROR_EXIT_CODE, f"{error.filename}: {reason(error)}"
    return FAILED_EXIT_CODE, f"{type(error).__name__}: {reason(error)} ({TRACEBACK} shows where)"


class _PathParser(flags.ArgumentParser):
    """Takes the path of a file or folder; ``~`` is the home folder."""

    syntactic_help = "a path"

    def parse(self, argument: str) -> str:
        if not argument.strip():
            raise ValueError("a path cannot be empty")
        if "\0" in argument:
            raise ValueError("a path cannot hold a NUL byte")
        other = not argument.isascii() and sys.getfilesystemencoding() != "utf-8"
        if other or re.search("[\ud800-\udfff]", argument):  # bytes that Python did not decode
            raise ValueError("a path must be UTF-8; where the locale is another, set PYTHONUTF8=1")
        try:
            return str(Path(argument).expanduser())
        except RuntimeError as error:
            raise ValueError(f"the home folder of {argument!r} is unknown") from error


def define_path(values: flags.FlagValues, name: str, default: str | None, text: str) -> None:
    """Defines a flag that is the path of a file or folder."""
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(_PathParser(), name, default, text, values, serializer)


def parse(
    argv: list[str], define: Callable[[flags.FlagValues], None], description: str | None
) -> tuple[Any, dict[str, str]]:
    """Parses a command line.

    Args:
        argv: the program's name and its arguments.
        define: defines the flags of the program.
        description: printed by --help, see `help_text`.

    Returns:
        The flags (a ``FlagValues``), and the overrides ``--config.FIELD=VALUE`` as a dict.

    Raises:
        flags.Error: an unknown flag or a value of the wrong type.
        InputError: a stray argument, an override without a value, or a number that is none.
    """
    rest, overrides = split_overrides(argv)
    values = flags.FlagValues()
    define(values)
    if _HELP & set(rest):
        print(help_text(description or "", values))
        sys.exit(0)
    stray = values(rest)[1:]
    if stray:
        raise InputError(f"unexpected argument {stray[0]!r}; flags look like --name=value")
    for name in values:
        if isinstance(value := values[name].value, float) and not math.isfinite(value):
            raise InputError(f"--{name}={value}: it must be finite")
    if overrides and "config" not in values:
        raise InputError(f"unknown flag --config.{next(iter(overrides))}: no config is read here")
    return values, overrides


def absolute(folder: str) -> str:
    """A folder as it identifies a run, whatever the current one."""
    return str(Path(folder).expanduser().resolve())


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Takes ``--config.FIELD=VALUE`` and ``--config.FIELD VALUE`` out of ``argv``."""
    rest: list[str] = []
    overrides: dict[str, str] = {}
    arguments = iter(argv)
    for argument in arguments:
        match = _OVERRIDE.match(argument)
        if match is None:
            rest.append(argument)
            continue
        value = match[2] if match[2] is not None else next(arguments, None)
        if value is None or (match[2] is None and value.startswith("--")):
            raise InputError(f"{argument} lacks a value")
        overrides.pop(match[1], None)  # the last of several counts, also in their order
        overrides[match[1]] = value
    return rest, overrides


def load_config(spec: str, overrides: dict[str, str], variant: str = "") -> Config:
    """Runs a config file.

    Args:
        spec: ``path/to/config.py`` or ``path/to/config.py:variant``.
        overrides: field path -> value as text.
        variant: appended to the variant of ``spec``, after a comma.

    Returns:
        What its ``get_config(variant)`` returns, with the overrides; no field can be added to it.

    Raises:
        InputError: no such file, variant or field.
        flags.Error: a value of another type.
    """
    path, _, argument = spec.partition(":")
    if "preset" in overrides:
        # The other fields would stay those of the preset that the variant names.
        if variant:
            raise InputError("--config.preset: a sweep takes --presets, or --rows of a --table")
        kept = [part for part in argument.split(",") if part.split("=")[-1] not in ("", *PRESETS)]
        meant = ",".join([*kept, f"preset={overrides['preset']}"])
        _run_file(path, meant)  # which names the presets that there are, if this is none of them
        raise InputError(f"name the preset in the variant: {path}:{meant}")
    config = _run_file(path, ",".join(part for part in (argument, variant) if part))
    override(config, overrides)
    return config.lock()


def _run_file(path: str, argument: str) -> ConfigDict:
    """The result of ``get_config(argument)`` of a config file."""
    if not os.path.isfile(path):
        meant = Path("configs", f"{Path(path).stem}.py")
        asked = f"; did you mean {meant}?" if os.path.isfile(meant) else ""
        raise InputError(f"there is no config file {path!r}{asked}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise InputError(f"{path} defines no get_config(variant)")
        config = get_config(argument)
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"{path} is not a Python file: {error}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} raises {type(error).__name__}: {reason(error)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"get_config of {path} returns {type(config).__name__}, not a ConfigDict")
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise InputError(f"the config of {path} lacks {', '.join(missing)}")
    if not isinstance(config.recipe, ConfigDict):
        raise InputError(f"field recipe of {path} is {config.recipe!r}, not a section")
    return config


def override(config: ConfigDict, overrides: dict[str, str]) -> None:
    """Sets fields of a config, in place.

    Raises:
        InputError: no such field, or a section that has fields of its own.
        flags.Error: a value of another type.
    """
    typed: list[str] = []
    for field, text in overrides.items():
        section, name = _find(config, field)
        value = section[name]
        if text.lower() == "none" and not isinstance(value, str):
            section[name] = None
            continue
        if value is None:
            section[name] = config_dict.placeholder(object)  # config_flags then takes any literal
        elif isinstance(value, tuple) and not text.strip():
            raise InputError(f"config field {field} is a list; it cannot become {text!r}")
        typed.append(f"--config.{field}={text}")
    values, argv = flags.FlagValues(), ["", *typed]
    config_flags.DEFINE_config_dict(
        "config", config, flag_values=values, lock_config=False, sys_argv=argv
    )
    values(argv)


def _find(config: ConfigDict, field: str) -> tuple[ConfigDict, str]:
    """The section of a field and its name there; an error lists what exists, or the new name."""
    *parents, name = field.split(".")
    section: Any = config
    for parent in parents:
        section = section[parent] if isinstance(section, ConfigDict) and parent in section else None
    if not isinstance(section, ConfigDict) or name not in section:
        known = section if isinstance(section, ConfigDict) else config
        raise InputError(f"config has no field {field!r}; {_advice(field, list(known))}")
    value: Any = section[name]
    if isinstance(value, ConfigDict):
        fields = ", ".join(f"{field}.{name}" for name in value)
        raise InputError(f"config field {field} is a section; set its fields: {fields}")
    return section, name


def _advice(field: str, known: list[str]) -> str:
    """The new name of a field of version 0.1, a close one, and all that exist."""
    section, _, name = field.rpartition(".")
    if section.startswith("recipe") and name in RENAMED:
        return hint(name, known)
    if not section and name in (*RECONSTRUCTION, *RECIPE):
        part = "recipe.reconstruction" if name in RECONSTRUCTION else "recipe"
        return f"did you mean '{part}.{name}'?"
    paths = {name: name for name in known}
    if section == "recipe":
        paths |= {name: f"reconstruction.{name}" for name in RECONSTRUCTION}
    if name in paths:
        return f"it is now '{section}.{paths[name]}'"
    close = difflib.get_close_matches(name, paths, 1)
    start = f"did you mean {paths[close[0]]!r}? " if close else ""
    return f"{start}there are {', '.join(sorted(paths.values()))}"
