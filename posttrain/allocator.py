"""glibc's allocator on a CPU: memory that a step frees stays with the process for the next step.

By default every block above 32 MB goes back to the kernel when it is freed, and its pages are faulted in and zeroed when the
next tensor of that size is made: for the output layer's gradient that takes longer than computing it.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Whether the process now keeps what it frees: not without glibc, nor where the environment sets the allocator itself."""
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))
