"""How long work would take and how much memory it would need, from a machine's speed.

The model is simple on purpose: processes start, bytes are read and written, weights are
passed over, products are computed. `benchmarks/estimate.py` compares it with real jobs.
Imports no torch: the front asks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from lowbit_server.quant.estimate import linear_names
from lowbit_server.quant.schemes import FloatScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lowbit_server.quant.schemes import Scheme
    from lowbit_server.store.headers import TensorEntry

    Entries = Mapping[str, TensorEntry]

# A process imports torch, transformers and what they need.
_START_S = 5.0
_PROCESS_BYTES = 740 << 20
_BITSANDBYTES_BYTES = 80 << 20
# Modules and kernels that only run when a model does, and what the allocator keeps.
_CALIBRATION_BYTES = 105 << 20
# Read through the page cache, written, synced and hashed; and read alone.
_WRITE_BYTES_PER_S = 400e6
_READ_BYTES_PER_S = 1.5e9
# A load, without what depends on its size; schemes whose kernels want another layout are
# laid out anew.
_LOAD_S = 0.1
_PACK_BYTES_PER_S = 170e6
_PACKED = {"bnb_4bit", "rtn", "gptq", "awq"}
# How many copies of the weights in float32 take as long as rounding them.
_PASSES = {"float": 2, "int8": 70, "bnb_4bit": 140, "rtn": 90, "gptq": 150, "awq": 800}
# Of the columns of all linear layers, the share whose inputs are not those of another one:
# query, key and value share theirs, as do gate and up.
_DISTINCT_INPUTS = 4 / 7
_FLOAT_BYTES = 4
# Of a weight, and of the largest X^T X, while a layer is rounded.
_COPIES = 8
_GRAM_COPIES = {"gptq": 7.5, "awq": 4}
# Those of `quant.decoder` and `quant.calibrated`, which import torch.
_ACTIVATION_BYTES = 2
_CHUNK_TOKENS = 4096

_PRODUCT_SIZE = 768
_COPY_BYTES = 32 << 20
_TRIALS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """What a device does in a second."""

    flops: float
    """Float32 operations in matrix products."""
    bytes: float
    """Bytes copied from memory to memory."""


@cache
def cpu_speed() -> Speed:
    """Measure this machine, once: some 50 ms."""
    import numpy as np  # noqa: PLC0415  (only estimates need it)

    square = np.ones((_PRODUCT_SIZE, _PRODUCT_SIZE), np.float32)
    memory = np.ones(_COPY_BYTES, np.uint8)
    product_s = _best(lambda: square @ square)
    return Speed(2 * _PRODUCT_SIZE**3 / product_s, _COPY_BYTES / _best(memory.copy))


def quantize_seconds(
    source: Entries, result: Entries, scheme: Scheme, tokens: int, speed: Speed
) -> float:
    """Return how long a job takes without an evaluation; `tokens` is those that calibrate."""
    weights = [source[name].shape for name in linear_names(source)]
    elements = sum(rows * columns for rows, columns in weights)
    if isinstance(scheme, FloatScheme):
        elements = sum(entry.elements for entry in source.values())
    passed_bytes = _PASSES[scheme.kind] * elements * _FLOAT_BYTES
    seconds = _START_S + _bytes(result) / _WRITE_BYTES_PER_S + passed_bytes / speed.bytes
    if tokens:
        squares = sum(columns**2 for _, columns in weights) * _DISTINCT_INPUTS
        # A forward pass, half of each X^T X, which is symmetric, and the solution. The products
        # are in bfloat16; what that gains goes into norms, attention and activations.
        flops = 2 * elements * tokens + squares * tokens
        flops += sum(columns**2 * (rows + columns) for rows, columns in weights)
        seconds += flops / speed.flops
    return seconds


def quantize_peak_bytes(source: Entries, scheme: Scheme, tokens: int, hidden: int) -> int:
    """Return the highest memory of a job without an evaluation, on the host.

    Files are mapped: what was read of the source counts, though the system may take it back.
    A weight is a few times in float32 while it is rounded. Calibration holds the hidden
    states and the inputs of the widest layer for all its tokens in bfloat16, four such for
    those that it computes at once, and a few of that layer's X^T X.
    """
    shapes = [source[name].shape for name in linear_names(source)]
    largest = max((rows * columns for rows, columns in shapes), default=0)
    peak = _PROCESS_BYTES + _bytes(source) + _COPIES * _FLOAT_BYTES * largest
    if scheme.kind in {"int8", "bnb_4bit"}:
        peak += _BITSANDBYTES_BYTES
    if tokens:
        widest = max((columns for _, columns in shapes), default=0)
        peak += _CALIBRATION_BYTES + _ACTIVATION_BYTES * tokens * (hidden + widest)
        peak += 4 * _ACTIVATION_BYTES * min(tokens, _CHUNK_TOKENS) * widest
        peak += int(_GRAM_COPIES[scheme.kind] * _FLOAT_BYTES * widest**2)
    return peak


def load_seconds(stored_bytes: int, scheme: Scheme, *, cold: bool) -> float:
    """Return how long a load takes; a cold worker imports its libraries first."""
    rate = _PACK_BYTES_PER_S if scheme.kind in _PACKED else _READ_BYTES_PER_S
    return (_START_S if cold else 0) + _LOAD_S + stored_bytes / rate


def load_peak_bytes(stored_bytes: int, live_bytes: int, *, mapped: bool) -> int:
    """Return the highest memory while loading.

    Weights that are not served as they are stored, `mapped`, are in memory twice.
    """
    return live_bytes if mapped else live_bytes + stored_bytes


def _bytes(entries: Entries) -> int:
    return sum(entry.bytes for entry in entries.values())


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
