"""How this process keeps memory that was freed."""

from __future__ import annotations

import ctypes

# Names and numbers of glibc's malloc.h; the threshold is the greatest that it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 << 20
_KEPT_BYTES = 64 << 20


def keep_freed_memory() -> None:
    """Let glibc keep the tensors of a step for the next one, where glibc is the allocator.

    It gives each back to the system otherwise, which takes longer than what is computed in
    it: every page must be cleared again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
