"""Reads and checks a GGUF file's metadata and tensor table; no tensor is touched.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from pathlib import Path

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Smallest encodings of a key with a value and of a tensor's entry: empty names, one
# dimension. They bound the counts before anything is read by them.
_MIN_PAIR_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_MAX_DIMENSIONS = 4
# A vocabulary of a million tokens takes about 60 MB; more is somebody's mischief.
_MAX_HEADER_BYTES = 256 * 2**20
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: shape in torch's order, number of its type, bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as "llama"."""
        return str(self.metadata["general.architecture"])


def read_gguf(path: Path) -> GgufHeader:
    """Return the metadata and tensor table of a file.

    Checked: magic, version, every count, string and array against the file's size, and
    that each tensor's data lies in the file.

    Raises LowbitError(SOURCE_CORRUPT) that names the file.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size < len(_MAGIC):
                _wrong("it is too short")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(data)
    except (ValueError, struct.error, OverflowError, RecursionError) as error:
        message = f"{path} is no valid GGUF file: {error}"
        raise LowbitError(Reason.SOURCE_CORRUPT, message) from error


def _read(data: mmap.mmap) -> GgufHeader:
    if data[: len(_MAGIC)] != _MAGIC:
        _wrong("it does not start with GGUF")
    cursor = _Cursor(data, len(_MAGIC))
    version, tensors, pairs = cursor.unpack("IQQ")
    if version not in _VERSIONS:
        _wrong(f"its version is {version}, readable are 2 and 3")
    if tensors * _MIN_TENSOR_BYTES + pairs * _MIN_PAIR_BYTES > len(data):
        _wrong(f"{tensors} tensors and {pairs} keys do not fit into {len(data)} bytes")
    metadata = {}
    for _ in range(pairs):
        key = cursor.string()
        if key in metadata:
            _wrong(f"it has the key {key!r} twice")
        metadata[key] = cursor.value(*cursor.unpack("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        _wrong("it names no architecture")
    table = [cursor.tensor() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        _wrong(f"its alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufHeader(metadata, _place(table, start, len(data)))


def _place(
    table: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int
) -> tuple[GgufTensor, ...]:
    # Importing gguf costs half a second (numpy); only those who read such files pay it.
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415

    placed = {}
    for name, shape, type_number, offset in table:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number)]
        if shape[-1] % block_elements:
            _wrong(f"rows of tensor {name!r} are no multiple of {block_elements}")
        length = math.prod(shape) // block_elements * block_bytes
        if start + offset + length > size:
            _wrong(f"tensor {name!r} ends after the end of the file")
        if name in placed:
            _wrong(f"it has the tensor {name!r} twice")
        placed[name] = GgufTensor(name, shape, type_number, start + offset, length)
    return tuple(placed.values())


class _Cursor:
    """Walks through a file's header; leaving it raises ValueError."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data = data
        self._end = min(len(data), _MAX_HEADER_BYTES)
        self.at = at

    def unpack(self, kinds: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + kinds)
        return layout.unpack_from(self._data, self._skip(layout.size))

    def string(self) -> str:
        (length,) = self.unpack("Q")
        begin = self._skip(length)
        return self._data[begin : self.at].decode()

    def value(self, kind: int) -> Any:  # noqa: ANN401  (what a file holds is known when read)
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            _wrong(f"a value has the unknown type {kind}")
        return self.unpack(_SCALARS[kind])[0]

    def _array(self) -> list[Any]:
        kind, count = self.unpack("IQ")
        # Every element takes at least one byte.
        if count > self._end - self.at:
            _wrong(f"an array of {count} elements leaves the header")
        if kind in _SCALARS:
            return list(self.unpack(f"{count}{_SCALARS[kind]}"))
        return [self.value(kind) for _ in range(count)]

    def _skip(self, length: int) -> int:
        if length > self._end - self.at:
            _wrong(f"{length} bytes at {self.at} leave the header")
        self.at += length
        return self.at - length

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dimensions,) = self.unpack("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            _wrong(f"tensor {name!r} has {dimensions} dimensions")
        shape = self.unpack(f"{dimensions}Q")
        type_number, offset = self.unpack("IQ")
        return name, tuple(reversed(shape)), type_number, offset


def _wrong(what: str) -> NoReturn:
    raise ValueError(what)
