"""nf4 and fp4 through bitsandbytes: 4 bit in blocks of 64 weights.

Imports torch and bitsandbytes: for job processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit_server.quant.casting import FLOAT_TYPES
from lowbit_server.quant.method import Stateless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lowbit_server.quant.layout import Block
    from lowbit_server.quant.schemes import Bnb4BitScheme

BLOCK_SIZE = 64
# The CPU kernels of bitsandbytes repack rows in tiles of this many.
ROW_TILE = 32


class Bnb4BitMethod(Stateless):
    """Scales each block by its largest magnitude (Dettmers et al. 2023, section 3)."""

    def __init__(self, scheme: Bnb4BitScheme, device: str) -> None:
        """Quantize on a device."""
        self._scheme = scheme
        self._device = device

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each linear layer as packed weight uint8 (out * in / 2, 1) and its scales."""
        from bitsandbytes.functional import quantize_4bit  # noqa: PLC0415

        weights = {linear.weight for linear in block.linears}
        for name in block.tensors:
            tensor = read(name)
            if name not in weights:
                yield name, tensor
                continue
            packed, state = quantize_4bit(
                tensor.contiguous().to(self._device),
                blocksize=BLOCK_SIZE,
                compress_statistics=self._scheme.double_quant,
                quant_type=self._scheme.quant_type,
            )
            yield name, packed
            for key, value in state.as_dict(packed=True).items():
                yield f"{name}.{key}", value

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says about it."""
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        config: dict[str, Any] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self._scheme.quant_type,
            bnb_4bit_compute_dtype=FLOAT_TYPES[self._scheme.compute_type],
            bnb_4bit_use_double_quant=self._scheme.double_quant,
        ).to_dict()
        return config
