"""What the host's processors are called and can do, and what its memory is asked for."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from pathlib import Path

# Advice of Linux 5.4 that Python's mmap has no name for.
_NUMBERS = {"MADV_PAGEOUT": 21} if sys.platform == "linux" else {}


def processor_name() -> str:
    """Return the processor's name, or its architecture where it has none."""
    return _cpuinfo("model name") or platform.machine()


def multiplies_bfloat16() -> bool:
    """Return whether the processor has the instructions that our compiled products need."""
    return "avx512_bf16" in _cpuinfo("flags").split()


def advise(address: int, size: int, advice: str) -> None:
    """Advise Linux on the whole pages among `size` bytes, by a name of C such as MADV_DONTNEED.

    Other systems, and kernels that know no such advice, go on without.
    """
    number = getattr(mmap, advice, _NUMBERS.get(advice))
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (address + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if number is not None and whole > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(whole), number)


def _cpuinfo(key: str) -> str:
    """Return what Linux says of the first processor, empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(found, "")
