"""Process-wide settings that make CPU runs faster; a program calls them, the library never does."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory instead of giving it back to the kernel.

    XLA on CPU allocates the temporaries of a step anew each time; fetching zeroed pages from the
    kernel costs more than the arithmetic of a small block's step.

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
