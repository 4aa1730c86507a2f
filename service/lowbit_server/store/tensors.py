"""Streams tensors from and to safetensors files, one at a time.

Imports torch: for job and worker processes only.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, BinaryIO, Self

import torch
from safetensors import safe_open

from lowbit_server.store.headers import METADATA_KEY, PREFIX_BYTES, TensorEntry
from lowbit_server.store.sealing import disk_full_is_named
from lowbit_server.store.sources import INDEX_FILE, SINGLE_FILE, read_headers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

MAX_SHARD_BYTES = 2_000_000_000

# A name, a type, a shape and two offsets: 150 bytes are usual for a decoder layer.
_HEADER_BYTES_PER_TENSOR = 256
_MIN_HEADER_BYTES = 4096
# Files are mapped into memory and kernels load whole vectors: a tensor that begins between
# two of them is slow, and torch's int8 kernel even crashes on one.
ALIGNMENT_BYTES = 64
# Tensors that would push the next one out of line wait for the end, if they are this small.
_MAX_HELD_BYTES = 1 << 16

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class TensorReader:
    """The tensors of a model's shards, read by name when asked for."""

    def __init__(self, weights: Sequence[Path]) -> None:
        """Check the headers; raises LowbitError(SOURCE_CORRUPT)."""
        self.entries: dict[str, TensorEntry] = {}
        self._stack = ExitStack()
        self._files: dict[str, safe_open] = {}
        for path, header in read_headers(weights).items():
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self.entries |= header
            self._files |= dict.fromkeys(header, file)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU; its memory is the mapped file's."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor


class TensorWriter:
    """Writes tensors into shards as they come.

    A safetensors header stands before the data that it describes, so room for it is kept
    free and filled in at the end; the format allows spaces after the header. The format
    has no gaps: small tensors of odd sizes are written last, so that all others begin at
    multiples of `ALIGNMENT_BYTES`.
    """

    def __init__(
        self, folder: Path, expected_tensors: int, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Prepare to write into a folder; a shard ends before it passes `max_shard_bytes`."""
        self._folder = folder
        header_bytes = _MIN_HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * expected_tensors
        self._header_bytes = header_bytes - (header_bytes + PREFIX_BYTES) % ALIGNMENT_BYTES
        self._max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        # Some scales and flags of each quantized layer, a few kilobytes.
        self._held: dict[str, torch.Tensor] = {}
        self.bytes = 0

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor; raises LowbitError(DISK_FULL)."""
        if tensor.nbytes % ALIGNMENT_BYTES and tensor.nbytes <= _MAX_HELD_BYTES:
            self._held[name] = tensor
        else:
            self._append(name, tensor)

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size = flat.numel()
        shard = self._shards[-1] if self._shards else None
        with disk_full_is_named(self._folder, size):
            if shard is None or not shard.takes(name, size, self._max_shard_bytes):
                if shard is not None:
                    shard.finish()
                shard = _Shard(self._path(len(self._shards)), self._header_bytes)
                self._shards.append(shard)
            shard.append(name, tensor, flat.numpy().data)
        self.bytes += size

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the files, or leave them unfinished after an error.

        Raises LowbitError(DISK_FULL).
        """
        if kind is None:
            for name, tensor in self._held.items():
                self._append(name, tensor)
            self._finish()
        elif self._shards:
            self._shards[-1].abandon()

    def _finish(self) -> None:
        """Give the shards their final names and index them if they are many."""
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        with disk_full_is_named(self._folder):
            if self._shards:
                self._shards[-1].finish()
            for number, shard in enumerate(self._shards):
                name = f"model-{number + 1:05}-of-{count:05}.safetensors"
                self._path(number).rename(self._folder / (name if count > 1 else SINGLE_FILE))
                weight_map |= dict.fromkeys(shard.header, name)
            if count > 1:
                index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
                text = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")

    def _path(self, number: int) -> Path:
        return self._folder / f"shard-{number:05}.part"


class _Shard:
    """One file that is being written."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self.header: dict[str, object] = {}
        self._header_bytes = header_bytes
        # What the entries will take as JSON: kept a bound, so that they fit for certain.
        self._used_bytes = _MIN_HEADER_BYTES // 2
        self._data_bytes = 0
        self._file: BinaryIO = path.open("wb")
        self._file.seek(PREFIX_BYTES + header_bytes)

    def takes(self, name: str, size: int, max_bytes: int) -> bool:
        fits = self._data_bytes + size + self._header_bytes + PREFIX_BYTES <= max_bytes
        return fits and self._used_bytes + _entry_bytes(name) <= self._header_bytes

    def append(self, name: str, tensor: torch.Tensor, data: memoryview) -> None:
        self._file.write(data)
        end = self._data_bytes + len(data)
        self.header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._data_bytes, end],
        }
        self._data_bytes = end
        self._used_bytes += _entry_bytes(name)

    def finish(self) -> None:
        header = {METADATA_KEY: {"format": "pt"}} | self.header
        text = json.dumps(header, separators=(",", ":")).encode()
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(PREFIX_BYTES, "little"))
        self._file.write(text.ljust(self._header_bytes))
        self._file.close()

    def abandon(self) -> None:
        # The disk may be full, and closing writes what is buffered.
        with suppress(OSError):
            self._file.close()


def _entry_bytes(name: str) -> int:
    # Escapes take up to six bytes a character; numbers and keys of the entry the rest.
    return 6 * len(name) + 200 if not name.isascii() else len(name) + 200
