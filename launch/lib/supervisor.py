"""A program in a child process, whose death in native code becomes one line."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable

# What JAX's client logs when it loses the others; all that follows belongs to it.
LOST = re.compile(rb"coordination_service|preemption_sync|JAX distributed service")

# Makes one line of the log of JAX's client and the name of a signal; None: there is nothing to say.
Explain = Callable[[str, str], str | None]


def run_in_child(prints: bool, explain: Explain) -> None:
    """Returns in a child of this process, which ends as the child does, with SystemExit.

    The child's standard output is Python's alone: native code prints to it too (gloo).

    Args:
        prints: whether it has a standard output.
        explain: called where a signal ended the child.
    """
    log, child_log = os.pipe()
    child_life, life = os.pipe()  # ends with this process
    child = os.fork()
    if child:
        os.close(child_log)
        os.close(child_life)
        raise SystemExit(_supervise(child, log, explain))
    os.close(log)
    os.close(life)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(os.dup(1) if prints else os.dup(nowhere), "w")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(nowhere, 1)
    os.dup2(child_log, 2)
    threading.Thread(target=_die_with_parent, args=(child_life,), daemon=True).start()


def _die_with_parent(life: int) -> None:
    os.read(life, 1)
    os._exit(1)


def _supervise(child: int, log: int, explain: Explain) -> int:
    """Passes the child's log on; its exit code, after one line where a signal ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the child, too
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    lost = b""
    with os.fdopen(log, "rb") as lines:
        for line in lines:
            if lost or LOST.search(line):
                lost += line
            else:
                os.write(2, line)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code >= 0:
        return code
    message = explain(lost.decode(errors="replace"), signal.Signals(-code).name)
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
    return 1
