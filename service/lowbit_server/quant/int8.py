"""LLM.int8 through bitsandbytes: 8-bit rows with one scale each.

Imports torch and bitsandbytes: for job processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowbit_server.quant.casting import cast
from lowbit_server.quant.method import Stateless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lowbit_server.quant.layout import Block
    from lowbit_server.quant.schemes import Int8Scheme

# The number that bitsandbytes writes for its only remaining layout, row-major.
_ROW_MAJOR = 0


class Int8Method(Stateless):
    """Scales each row by its largest magnitude (Dettmers et al. 2022, section 3)."""

    def __init__(self, scheme: Int8Scheme, device: str) -> None:
        """Quantize on a device."""
        self._scheme = scheme
        self._device = device

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each linear layer as weight int8 (out, in), SCB float32 (out) and its format.

        Raises INVALID_FIELD for a weight beyond fp16, in which bitsandbytes quantizes.
        """
        from bitsandbytes.functional import int8_vectorwise_quant  # noqa: PLC0415

        linears = {linear.weight: linear for linear in block.linears}
        for name in block.tensors:
            tensor = read(name)
            if name not in linears:
                yield name, tensor
                continue
            half = cast(name, tensor, torch.float16).contiguous().to(self._device)
            weight, scales, _ = int8_vectorwise_quant(half)
            yield name, weight
            yield f"{linears[name].name}.SCB", scales
            yield f"{linears[name].name}.weight_format", torch.tensor(_ROW_MAJOR, dtype=torch.uint8)

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says about it."""
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        config: dict[str, Any] = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=self._scheme.outlier_threshold
        ).to_dict()
        return config
