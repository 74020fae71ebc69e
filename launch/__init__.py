"""Programs to run from a checkout: ``python -m launch.NAME``."""

import os
import signal
import sys
from types import FrameType, TracebackType

_show = sys.excepthook


def show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints that gpu_ops is not compiled, which its import says before a program's main runs."""
    if not isinstance(error, ImportError) or error.name != "gpu_ops":
        return _show(kind, error, trace)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def stop_import(number: int, frame: FrameType | None) -> None:
    """Ends the process at Ctrl-C: imports and the collector's callbacks may lose an exception."""
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


sys.excepthook = show_error
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_import)  # until `process.interruptible`
