"""The first layout of GPTQ checkpoints, called "gptq" in `checkpoint_format`.

Codes of b bits lie least significant bit first, without gaps, in the words of a column, so
32 codes fill b words; with 3 bits two codes of 32 lie across words. The layout is that of
GPTQ-for-LLaMa and AutoGPTQ (`QuantLinear.pack`), which gptqmodel and vLLM read as well.

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

    from lowbit_server.quant.schemes import GptqScheme, RtnScheme

WORD_BITS = 32
_WORD = (1 << WORD_BITS) - 1


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return words int32 (n * bits / 32, columns) of codes (n, columns) below 2 ** bits."""
    lanes = codes.reshape(-1, WORD_BITS, codes.shape[1])
    words = torch.zeros(len(lanes), bits, codes.shape[1], dtype=torch.int64, device=codes.device)
    for lane in range(WORD_BITS):
        word, shift = divmod(lane * bits, WORD_BITS)
        code = (lanes[:, lane].to(torch.int64) & ((1 << bits) - 1)) << shift
        words[:, word] |= code & _WORD
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= code >> WORD_BITS
    # The upper half of unsigned words is the negative half of signed ones.
    words -= (words >> (WORD_BITS - 1)) << WORD_BITS
    return words.to(torch.int32).reshape(-1, codes.shape[1])


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return codes uint8 (n, columns) of words int32 (n * bits / 32, columns)."""
    groups = words.reshape(-1, bits, words.shape[1])
    shape = len(groups), WORD_BITS, words.shape[1]
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for lane in range(WORD_BITS):
        word, shift = divmod(lane * bits, WORD_BITS)
        code = groups[:, word] >> shift  # drags the sign along, which the masks cut off
        if shift + bits > WORD_BITS:
            low = WORD_BITS - shift
            code = (code & ((1 << low) - 1)) | (groups[:, word + 1] << low)
        codes[:, lane] = code & ((1 << bits) - 1)
    return codes.reshape(-1, words.shape[1])


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One linear layer: weight[o, i] = (code[i, o] - zero[g, o]) * scale[g, o], g = g_idx[i]."""

    keys: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    bits: int
    qweight: Tensor
    """Codes, int32 (in * bits / 32, out)."""
    qzeros: Tensor
    """Zero points less one, int32 (groups, out * bits / 32)."""
    scales: Tensor
    """fp16 (groups, out)."""
    g_idx: Tensor
    """Each column's group, int32 (in)."""

    @classmethod
    def of(cls, bits: int, codes: Tensor, zeros: Tensor, scales: Tensor) -> Self:
        """Pack codes (in, out), zero points from 1 to 2 ** bits and scales (groups, out).

        A zero point of 0 has no place in this layout: stored as -1 it comes back as
        2 ** bits from some readers and as 0 from others.
        """
        size = len(codes) // len(scales)
        return cls(
            bits,
            pack(codes, bits),
            pack((zeros - 1).T, bits).T.contiguous(),
            scales.to(torch.float16).contiguous(),
            torch.arange(len(codes), dtype=torch.int32, device=codes.device) // size,
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        """Return layers of the same input as one, or None when bits or groups differ."""
        first = parts[0]
        if any(one.bits != first.bits or not one.g_idx.equal(first.g_idx) for one in parts):
            return None
        return cls(
            first.bits,
            torch.cat([one.qweight for one in parts], dim=1),
            torch.cat([one.qzeros for one in parts], dim=1),
            torch.cat([one.scales for one in parts], dim=1),
            first.g_idx,
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, by name, for the layer of a name."""
        return {f"{name}.{key}": getattr(self, key) for key in self.keys}

    def check(self, name: str, out_features: int, in_features: int) -> None:
        """Raise ValueError that names the layer when shapes or groups do not fit it."""
        if in_features % WORD_BITS or out_features % WORD_BITS:
            raise ValueError(f"{name} has {out_features} x {in_features}: no multiples of 32")
        groups = len(self.scales)
        expected = {
            "qweight": (in_features * self.bits // WORD_BITS, out_features),
            "qzeros": (groups, out_features * self.bits // WORD_BITS),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }
        for key, shape in expected.items():
            found = tuple(getattr(self, key).shape)
            if found != shape:
                raise ValueError(f"{name}.{key} has the shape {found}, {shape} was expected")
        if not 0 <= int(self.g_idx.min()) <= int(self.g_idx.max()) < groups:
            raise ValueError(f"{name}.g_idx names groups that are not among its {groups}")

    @property
    def group_size(self) -> int | None:
        """Columns of a group, or None when groups differ in size."""
        counts = self.g_idx.bincount(minlength=len(self.scales))
        return int(counts[0]) if bool((counts == counts[0]).all()) else None

    def order(self) -> Tensor | None:
        """Return the columns sorted by their groups, int64 (in), or None when they are."""
        order = self.g_idx.argsort(stable=True)
        return None if bool((order.diff() > 0).all()) else order

    def codes(self) -> Tensor:
        """Return the codes, uint8 (in, out)."""
        return unpack(self.qweight, self.bits)

    def zeros(self) -> Tensor:
        """Return the zero points, int32 (groups, out)."""
        return unpack(self.qzeros.T, self.bits).T.to(torch.int32) + 1

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in), computed in float32 and rounded once."""
        groups = self.g_idx.to(torch.int64)
        steps = self.codes().to(torch.int32) - self.zeros()[groups]
        return (steps * self.scales.float()[groups]).T.to(dtype).contiguous()


def quantization_config(scheme: RtnScheme | GptqScheme) -> dict[str, Any]:
    """Return what config.json says about a checkpoint in the GPTQ layout.

    Groups are runs of neighbouring columns in any order of rounding: to readers, none is
    reordered (`desc_act`).
    """
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": False,
        # Where gptqmodel names itself, too; `quant.foreign` knows the method by it.
        "meta": {
            "quantizer": [f"lowbit-server:{version('lowbit-server')}"],
            "method": scheme.name,
        },
    }
