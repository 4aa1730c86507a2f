"""Reads a checkpoint's tensors as what a decoder runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch

from lowbit_server.hardware import advise
from lowbit_server.models.grouped_loading import IGNORED, is_grouped, read_grouped
from lowbit_server.models.linears import linear
from lowbit_server.models.weights import Bnb4BitWeight, Int8Weight, Weight
from lowbit_server.quant.foreign import foreign_scheme
from lowbit_server.store.sources import shards
from lowbit_server.store.tensors import ALIGNMENT_BYTES, TensorReader

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor, nn
    from transformers import PreTrainedConfig

EMBEDDING = "model.embed_tokens.weight"
_INT8_FORMAT = "weight_format"
_CODES = (torch.int8, torch.uint8, torch.int32)


class Checkpoint:
    """A folder's safetensors, each tensor read once."""

    def __init__(self, folder: Path, config: PreTrainedConfig, device: str) -> None:
        """Open the files; what is not quantized gets the type that the model computes in.

        That is the configuration's, or the embedding's where it names none; on a CPU
        float32 instead of fp16, whose products take several times as long there.
        Raises LowbitError: SOURCE_CORRUPT, or SOURCE_UNSUPPORTED for an unknown layout.
        """
        self._device = device
        self._quantization = getattr(config, "quantization_config", None) or {}
        self._reader = TensorReader(shards(folder))
        # Those in the mapped file, whose pages would count as this process's.
        self._codes: list[Tensor] = []
        self.left = set(self._reader.entries)
        """Names of tensors that were not read."""
        if is_grouped(config):
            foreign_scheme(self._quantization, self._reader.entries)  # raises for other layouts
        named = config.dtype or self._reader.tensor(EMBEDDING).dtype
        self._dtype = torch.float32 if device == "cpu" and named == torch.float16 else named

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files; what was read stays, but for codes, which modules have packed anew."""
        for codes in self._codes:
            advise(codes.data_ptr(), codes.nbytes, "MADV_DONTNEED")
        self._reader.__exit__(kind, error, trace)

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in the model's dtype.

        Raises ValueError that names it when it is missing or of another shape.
        """
        return _shaped(name, self._read(name), *shape).to(self._dtype)

    def optional(self, name: str, *shape: int) -> Tensor | None:
        """Return a tensor as `tensor` does, or None when there is none."""
        return self.tensor(name, *shape) if name in self.left else None

    def linear(self, sizes: Mapping[str, int], columns: int) -> nn.Module:
        """Return one module for layers that share their input, outputs side by side.

        `sizes` has each layer's name and output size; `columns` is the input's.
        Raises ValueError that names a layer which is missing or does not fit.
        """
        weights = [self._weight(name, rows, columns) for name, rows in sizes.items()]
        found = {name: self.optional(f"{name}.bias", rows) for name, rows in sizes.items()}
        biases = None
        if any(bias is not None for bias in found.values()):
            biases = [
                torch.zeros(sizes[name], dtype=self._dtype, device=self._device)
                if bias is None
                else bias
                for name, bias in found.items()
            ]
        return linear(weights, biases, self._dtype)

    def check_finished(self) -> None:
        """Raise ValueError when tensors are left that the architecture has no place for."""
        if left := sorted(name for name in self.left if not name.endswith(IGNORED)):
            raise ValueError(f"the checkpoint does not fit its architecture: {', '.join(left[:5])}")

    def _weight(self, name: str, rows: int, columns: int) -> Weight:
        if f"{name}.qweight" in self.left:
            layer = read_grouped(name, self._quantization, self._read)
            layer.check(name, rows, columns)
            return layer
        weight = f"{name}.weight"
        if f"{name}.SCB" in self.left:
            self.left.discard(f"{name}.{_INT8_FORMAT}")
            codes = _shaped(weight, self._read(weight), rows, columns)
            return Int8Weight(codes, _shaped(f"{name}.SCB", self._read(f"{name}.SCB"), rows))
        prefix = f"{weight}."
        if state := {key: self._read(key) for key in sorted(self.left) if key.startswith(prefix)}:
            return Bnb4BitWeight.of(self._read(weight), state, rows, columns)
        return self.tensor(weight, rows, columns)

    def _read(self, name: str) -> Tensor:
        if name not in self.left:
            raise ValueError(f"the checkpoint has no {name}")
        self.left.remove(name)
        tensor = self._reader.tensor(name)
        if tensor.dtype in _CODES:
            self._codes.append(tensor)
        if tensor.data_ptr() % ALIGNMENT_BYTES:  # kernels may crash on it (see `store.tensors`)
            tensor = tensor.clone()
        return tensor.to(self._device)


def _shaped(name: str, tensor: Tensor, *shape: int) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, {shape} was expected")
    return tensor
