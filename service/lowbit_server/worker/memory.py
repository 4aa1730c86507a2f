"""Gives memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil

from lowbit_server.hardware import advise


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


def page_out_cuda() -> None:
    """Let the system have the pages of CUDA's libraries, some 150 MiB.

    torch has them read in when it is imported, where there is no GPU too. Pages that are
    needed after all come again; those that another process has stay with it.
    """
    if sys.platform != "linux":
        return
    for mapping in psutil.Process().memory_maps(grouped=False):
        path = Path(mapping.path)
        is_cuda = "nvidia" in path.parts or "cuda" in path.name
        # What was written there, if only by the linker, is nowhere else.
        if is_cuda and "w" not in mapping.perms and not mapping.anonymous:
            first, end = (int(address, 16) for address in mapping.addr.split("-"))
            for advice in ("MADV_PAGEOUT", "MADV_DONTNEED"):
                advise(first, end - first, advice)
