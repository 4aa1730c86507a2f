"""Floating-point types and casts between them.

Imports torch: for job and worker processes only.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbit_server.quant.schemes import FloatType
    from lowbit_server.store.headers import TensorEntry

FLOAT_TYPES: Mapping[FloatType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

_STORED: Mapping[str, FloatType] = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


def type_name(kind: FloatType) -> str:
    """Return the name that config.json uses for a type, such as "bfloat16"."""
    return str(FLOAT_TYPES[kind]).removeprefix("torch.")


def float_type(entries: Mapping[str, TensorEntry]) -> FloatType:
    """Return the floating-point type that most of a model's elements have.

    Raises LowbitError(SOURCE_UNSUPPORTED) for types that cannot be served as they are.
    """
    elements: Counter[FloatType] = Counter()
    for name, entry in entries.items():
        if entry.dtype in _STORED:
            elements[_STORED[entry.dtype]] += entry.elements
        elif entry.dtype.startswith(("F", "C")):
            message = f"tensor {name!r} has the type {entry.dtype}: ask for fp32, fp16 or bf16"
            raise LowbitError(Reason.SOURCE_UNSUPPORTED, message)
    if not elements:
        raise LowbitError(Reason.SOURCE_UNSUPPORTED, "the source holds no floating-point weights")
    return elements.most_common(1)[0][0]


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a floating-point tensor in another type; integers stay as they are.

    Raises LowbitError(INVALID_FIELD) that names the tensor when fp16 cannot hold a value.
    """
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and torch.isinf(result).any() and not torch.isinf(tensor).any():
        largest = tensor.abs().max().item()
        raise invalid("type", f"tensor {name} reaches {largest:.6g}, fp16 holds 65504: use bf16")
    return result
