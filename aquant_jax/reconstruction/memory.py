"""The memory that is free for a computation."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import jax
import psutil

CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int:
    """Bytes that the default device can still allocate.

    On a CPU this is what the machine has available, less where a control group or ``ulimit -v``
    leaves less.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    free = [psutil.virtual_memory().available]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return max(min(free), 0)
