"""The GEMM layout of AWQ checkpoints: 4 bit, called "gemm" in `version`.

Eight neighbours of a row share a word, in the order in which the kernels of llm-awq and
AutoAWQ (`WQLinear_GEMM`) unpack them, which gptqmodel and vLLM read as well.

Imports torch: for job and worker processes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of its eight neighbours lies in each lane of a word, lowest lane first."""
LANES = len(ORDER)
_MASK = (1 << BITS) - 1


def pack(codes: Tensor) -> Tensor:
    """Return words int32 (rows, columns / 8) of codes (rows, columns) below 16."""
    neighbours = codes.reshape(len(codes), -1, LANES).to(torch.int32)
    words = torch.zeros(neighbours.shape[:2], dtype=torch.int32, device=codes.device)
    for lane, place in enumerate(ORDER):
        words |= neighbours[:, :, place] << (BITS * lane)  # the last one sets the sign
    return words


def unpack(words: Tensor) -> Tensor:
    """Return codes uint8 (rows, columns) of words int32 (rows, columns / 8)."""
    codes = torch.empty(*words.shape, LANES, dtype=torch.uint8, device=words.device)
    for lane, place in enumerate(ORDER):
        codes[:, :, place] = (words >> (BITS * lane)) & _MASK
    return codes.reshape(len(words), -1)


@dataclass(frozen=True, slots=True)
class AwqLinear:
    """One linear layer: weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o], g = i // size."""

    bits: ClassVar[int] = BITS
    keys: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    qweight: Tensor
    """Codes, int32 (in, out / 8)."""
    qzeros: Tensor
    """Zero points from 0 to 15, int32 (groups, out / 8)."""
    scales: Tensor
    """fp16 (groups, out)."""

    @classmethod
    def of(cls, codes: Tensor, zeros: Tensor, scales: Tensor) -> Self:
        """Pack codes uint8 (in, out), zero points from 0 to 15 and scales (groups, out)."""
        return cls(pack(codes), pack(zeros), scales.to(torch.float16).contiguous())

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        """Return layers of the same input as one, or None when their groups differ."""
        if any(len(one.scales) != len(parts[0].scales) for one in parts):
            return None
        keys = [[getattr(one, key) for one in parts] for key in cls.keys]
        return cls(*(torch.cat(tensors, dim=1) for tensors in keys))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, by name, for the layer of a name."""
        return {f"{name}.{key}": getattr(self, key) for key in self.keys}

    def check(self, name: str, out_features: int, in_features: int) -> None:
        """Raise ValueError that names the layer when shapes or groups do not fit it."""
        groups = len(self.scales)
        if out_features % LANES or not groups or in_features % groups:
            raise ValueError(
                f"{name} has {out_features} x {in_features} in {groups} groups: rows must be a "
                f"multiple of {LANES}, columns one of the groups"
            )
        expected = {
            "qweight": (in_features, out_features // LANES),
            "qzeros": (groups, out_features // LANES),
            "scales": (groups, out_features),
        }
        for key, shape in expected.items():
            found = tuple(getattr(self, key).shape)
            if found != shape:
                raise ValueError(f"{name}.{key} has the shape {found}, {shape} was expected")

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return len(self.qweight) // len(self.scales)

    def order(self) -> None:
        """Return nothing: columns lie in the order of their groups."""

    def codes(self) -> Tensor:
        """Return the codes, uint8 (in, out)."""
        return unpack(self.qweight)

    def zeros(self) -> Tensor:
        """Return the zero points, int32 (groups, out)."""
        return unpack(self.qzeros).to(torch.int32)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in), computed in float32 and rounded once."""
        groups = len(self.scales)
        codes = self.codes().view(groups, self.group_size, -1).to(torch.int32)
        weight = (codes - self.zeros()[:, None]) * self.scales.float()[:, None]
        return weight.flatten(0, 1).T.to(dtype).contiguous()


def quantization_config(group_size: int) -> dict[str, Any]:
    """Return what config.json says about a checkpoint in this layout."""
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": group_size,
        # Without one, points are stored all the same: 8 for each group.
        "zero_point": True,
        "modules_to_not_convert": None,
        "meta": {"quantizer": [f"lowbit-server:{version('lowbit-server')}"]},
    }
