"""LLM.int8 checkpoints on a CPU: 8-bit weights, activations as they are.

bitsandbytes has no integer kernels for CPUs; its emulation in float16 is several times
slower than bf16. Torch's own kernel multiplies by the 8-bit rows directly, and leaving
activations unquantized is closer to the source model than LLM.int8 itself (docs/adr/0007).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKED_ROWS = 16
"""Up to this many rows the packed kernel beats a dense product of unpacked weights."""
LARGEST_CODE = 127
"""The code of each row's largest magnitude (Dettmers et al. 2022, section 3)."""


class Int8Linear(nn.Module):
    """y = x (codes * scales)^T + bias, with codes int8 (out, in) and one scale a row."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, largest: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Take bitsandbytes' codes and each row's largest magnitude, float32 (out)."""
        super().__init__()
        # A copy begins in line; in a mapped file of others codes may begin anywhere, and
        # the packed kernel crashes on that.
        self.register_buffer("codes", codes.clone())
        self.register_buffer("scales", (largest / LARGEST_CODE).to(dtype))
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


def use_int8_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the LLM.int8 layers of a model that lies on a CPU, in place."""
    from bitsandbytes.nn import Linear8bitLt  # noqa: PLC0415  (slow, and rarely needed)

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear8bitLt):
            weight = layer.weight
            largest = layer.state.SCB if weight.SCB is None else weight.SCB
            model.set_submodule(name, Int8Linear(weight.data, largest, layer.bias, dtype))
