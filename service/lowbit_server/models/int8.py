"""LLM.int8 checkpoints on a CPU: 8-bit weights, activations as they are.

bitsandbytes has no integer kernels for CPUs; its emulation in float16 is several times
slower than bf16. Torch's own kernel multiplies by the 8-bit rows directly, and leaving
activations unquantized is closer to the source model than LLM.int8 itself (docs/adr/0007).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from lowbit_server.models.weights import Int8Weight

PACKED_ROWS = 16
"""Up to this many rows the packed kernel beats a dense product of unpacked weights."""


class Int8Linear(nn.Module):
    """y = x (codes * scales)^T + bias, with codes int8 (out, in) and one scale a row."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Take a weight, its bias and the model's dtype."""
        super().__init__()
        # A copy begins in line; in a mapped file of others codes may begin anywhere, and
        # the packed kernel crashes on that.
        self.register_buffer("codes", weight.codes.clone())
        self.register_buffer("scales", weight.scales().to(dtype))
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out) of inputs (..., in), both in the model's dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) <= PACKED_ROWS:
            product = torch._weight_int8pack_mm(rows, self.codes, self.scales)  # noqa: SLF001
        else:
            product = functional.linear(rows, self.codes.to(rows.dtype)) * self.scales
        if self.bias is not None:
            product += self.bias
        return product.reshape(*inputs.shape[:-1], -1)
