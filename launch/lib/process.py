"""Process-wide settings of the programs; the library never makes any."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import logging
import os
import resource
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import logging as absl_logging

import aquant_jax
import launch
from aquant_jax.errors import InputError, reason

_command: contextvars.ContextVar[str | None] = contextvars.ContextVar("command", default=None)
OUTPUT = "standard output cannot be written"
_MOST_COMPILED = 2**32  # bytes
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_OURS = tuple(str(Path(package.__path__[0]).resolve()) for package in (aquant_jax, launch))


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory instead of returning it to the kernel.

    XLA on CPU allocates the temporaries of every step again. Fetching zeroed pages from the kernel
    costs more than the arithmetic of a small block's step.

    Returns:
        Whether it applied (Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**28))
    return all(mallopt(name, value) == 1 for name, value in settings)


def keep_compiled_programs() -> None:
    """Make JAX keep compiled programs on disk, so that a second run does not compile them again.

    They lie in the user's cache folder, where the least recently used ones go beyond 4 GiB;
    ``JAX_COMPILATION_CACHE_DIR`` names another folder. JAX warns of one that cannot be written, and
    compiles.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if jax.config.values["jax_compilation_cache_dir"] or not Path(base).is_absolute():
        return  # one is set already, or the home folder is unknown
    jax.config.update("jax_compilation_cache_dir", str(Path(base) / "aquant-jax" / "compiled"))
    jax.config.update("jax_compilation_cache_max_size", _MOST_COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def remember_command(module: str, arguments: list[str]) -> None:
    """Keeps the command line of this process, which `command` returns."""
    spec = getattr(sys.modules.get(module), "__spec__", None)  # of __main__: its real name
    keep_command(shlex.join(["python", "-m", spec.name if spec else module, *arguments]))


def keep_command(text: str | None) -> None:
    """Keeps a command line as that of this process: a worker is part of the program of another."""
    _command.set(text)


def command() -> str | None:
    """The command line of this process, to be typed again; None outside a program."""
    return _command.get()


def usage() -> dict[str, Any]:
    """The command of this process, and the most memory that it has had, in bytes."""
    return {"command": command(), "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def flushed_output() -> Iterator[None]:
    """Flushes standard output at the end: Python does so when no error can be one line any more.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    finally:
        try:
            print(end="", flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again
            raise InputError(f"{OUTPUT}: {reason(error)}") from error


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes Ctrl-C end the program in the middle of a garbage collection too.

    Python reports an exception of the collector's callbacks, of which JAX has one, and ignores it.
    """
    if signal.getsignal(signal.SIGINT) is launch.stop_import:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    report = sys.unraisablehook

    def send_again(ignored: Any) -> None:
        if ignored.exc_type is not KeyboardInterrupt:
            return report(ignored)
        to_main = threading.main_thread().ident, signal.SIGINT
        try:
            threading.Timer(0.1, signal.pthread_kill, to_main).start()
        except KeyboardInterrupt:  # a slow machine is not out of here yet, and would ignore it too
            send_again(ignored)

    sys.unraisablehook = send_again
    try:
        yield
    finally:
        sys.unraisablehook = report


@contextlib.contextmanager
def progress_on_stderr() -> Iterator[None]:
    """Shows our log from INFO on, and that of orbax, which uses absl too, from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(absl_logging.PythonFormatter())
    handler.addFilter(_shown)
    logger, verbosity = absl_logging.get_absl_logger(), absl_logging.get_verbosity()
    propagate, logger.propagate = logger.propagate, False  # the root would print all of it again
    absl_logging.set_verbosity(absl_logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        absl_logging.set_verbosity(verbosity)
        logger.propagate = propagate


def _shown(record: logging.LogRecord) -> bool:
    ours = str(Path(record.pathname).resolve()).startswith(_OURS)
    return ours or record.levelno >= logging.WARNING
