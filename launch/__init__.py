"""Programs to run from a checkout: ``python -m launch.NAME``."""

import sys
from types import TracebackType

_show = sys.excepthook


def show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints that gpu_ops is not compiled, which its import says before a program's main runs."""
    if not isinstance(error, ImportError) or error.name != "gpu_ops":
        return _show(kind, error, trace)
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


sys.excepthook = show_error
