"""What the host's processors are called and what they can do."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """Return the processor's name, or its architecture where it has none."""
    return _cpuinfo("model name") or platform.machine()


def multiplies_bfloat16() -> bool:
    """Return whether the processor has the instructions that our compiled products need."""
    return "avx512_bf16" in _cpuinfo("flags").split()


def _cpuinfo(key: str) -> str:
    """Return what Linux says of the first processor, empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(found, "")
