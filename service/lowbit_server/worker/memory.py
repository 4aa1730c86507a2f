"""Gives memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def release_memory() -> None:
    """Free what nothing refers to, down to the allocators of C and of the device."""
    gc.collect()
    # Looked up, not imported: a process that never loaded weights has no torch.
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # glibc keeps freed memory for later unless it is told; other C libraries lack the call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
