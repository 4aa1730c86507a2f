"""Reads and checks the header of a safetensors file; no tensor is touched.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from pathlib import Path

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "__metadata__"
# Readers count elements in 64 bits; a shape beyond that is none, also with a zero in it.
_MAX_ELEMENTS = 2**63

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: the format's dtype name, its shape and its bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the data, bytes."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a file in the order of their data.

    Checked: the header lies in the file, names are unique, every tensor has exactly the
    bytes of its shape and type, and the data has neither gaps nor overlaps nor a rest.

    Raises LowbitError(SOURCE_CORRUPT) that names the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(PREFIX_BYTES), "little")
            if size < PREFIX_BYTES or length > min(MAX_HEADER_BYTES, size - PREFIX_BYTES):
                _corrupt(path, f"a header of {length} bytes does not fit into {size} bytes")
            text = file.read(length).decode()
        if not text.startswith("{"):
            _corrupt(path, "its header does not start with '{'")
        header = json.loads(text, object_pairs_hook=_unique)
        return _check(path, header, size - PREFIX_BYTES - length)
    except (ValueError, RecursionError) as error:
        _corrupt(path, str(error) or "it is nested too deeply", error)


def _check(path: Path, header: object, data_bytes: int) -> dict[str, TensorEntry]:
    if not isinstance(header, dict):
        _corrupt(path, "its header is not a JSON object")
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _corrupt(path, "its metadata is not a map of strings")
    "".join(metadata.values()).encode()
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = 0
    for name, entry in ordered.items():
        if entry.begin != at:
            _corrupt(path, f"tensor {name!r} starts at {entry.begin}, {at} was expected")
        at = entry.end
    if at != data_bytes:
        _corrupt(path, f"its tensors end at {at}, its data at {data_bytes} bytes")
    return ordered


def _entry(path: Path, name: str, value: object) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if (
            not rest and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        ):
            pass
        case _:
            _corrupt(path, f"the entry of tensor {name!r} is malformed")
    if dtype not in DTYPE_BITS:
        _corrupt(path, f"tensor {name!r} has the unknown type {dtype!r}")
    entry = TensorEntry(dtype, tuple(shape), begin, end)
    # Python integers do not overflow, so these products are what they say.
    if math.prod(max(number, 1) for number in shape) >= _MAX_ELEMENTS:
        _corrupt(path, f"tensor {name!r} has the impossible shape {list(shape)}")
    if entry.elements * DTYPE_BITS[dtype] != 8 * entry.bytes:
        _corrupt(path, f"tensor {name!r} of shape {list(shape)} does not have {entry.bytes} bytes")
    return entry


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in pairs:
        name.encode()  # JSON may escape half a character, which no UTF-8 text has
    result = dict(pairs)
    if len(result) != len(pairs):
        message = "it names something twice"
        raise ValueError(message)
    return result


def _corrupt(path: Path, what: str, cause: Exception | None = None) -> NoReturn:
    raise LowbitError(
        Reason.SOURCE_CORRUPT, f"{path} is no valid safetensors file: {what}"
    ) from cause
