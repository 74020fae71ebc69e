"""Exceptions that the library raises, the text of any exception in one line, and sizes."""

import os
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """The caller's input cannot be used; the message names the offender and both values.

    A ``ValueError``, so library users catch it as they would any other; the launchers print it as
    one line and exit with code 2 instead of showing a traceback.

    >>> import aquant_jax as aq
    >>> try:
    ...     aq.recipes.preset("aquent")
    ... except aq.InputError as error:
    ...     print(error)  # doctest: +ELLIPSIS
    unknown preset 'aquent'; presets: nearest, adaround, brecq, qdrop, aquant, ...
    """


class SharedError(InputError):
    """An InputError of one process, which its message names, raised by all processes of a mesh."""


class ReconstructionError(RuntimeError):
    """Reconstruction of a block failed; the message names its layers.

    >>> import aquant_jax as aq
    >>> issubclass(aq.ReconstructionError, aq.InputError)  # the input was in order
    False
    """


def check_type(argument: str, value: Any, kind: type | tuple[type, ...], wanted: str) -> None:
    """InputError unless an argument is of this type; `wanted` says what it must be."""
    if not isinstance(value, kind):
        raise InputError(f"{argument} is of type {type(value).__name__}; it must be {wanted}")


def to_path(argument: str, value: Any) -> Path:
    """The path of a file or folder; InputError if an argument is none."""
    check_type(argument, value, (str, os.PathLike), "a path")
    return Path(value)


def install_command(extra: str) -> str:
    """The command that installs an extra, for the messages about a package that is missing.

    >>> install_command("onnx")
    "pip install -e '.[onnx]' in the clone"
    """
    return f"pip install -e '.[{extra}]' in the clone"


def reason(error: BaseException) -> str:
    """The first line of an exception's message, or its type's name if the message is empty.

    >>> reason(KeyError()), reason(FileNotFoundError(2, "No such file", "x"))
    ('KeyError', 'No such file')
    """
    message = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def byte_size(size: int) -> str:
    """A number of bytes in the largest unit of which there is one.

    >>> byte_size(1000), byte_size(3 * 2**29)
    ('1000 bytes', '1.50 GiB')
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"
