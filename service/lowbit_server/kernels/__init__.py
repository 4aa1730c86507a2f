"""Kernels in C where torch has no fast ones; the build compiles them (`hatch_build.py`).

A machine without a compiler has none, and a CPU may lack a kernel's instructions: whoever
calls one goes on with torch then.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path

# Loaded first: the library has no OpenMP of its own, it finds the functions of torch's.
import torch as torch

_FILE = Path(__file__).with_name("kernels.so")


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None where there are none."""
    try:
        return ctypes.CDLL(str(_FILE))
    except OSError:
        return None


def digest() -> str:
    """Return the SHA-256 of the compiled kernels, empty where there are none."""
    return hashlib.sha256(_FILE.read_bytes()).hexdigest() if library() else ""
