"""Round to nearest: each weight goes to the nearest point of its group's grid.

The yardstick of the calibrated methods, in the same layout. Imports torch: for job
processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit_server.quant.grids import check_finite, grid, nearest
from lowbit_server.quant.method import Stateless
from lowbit_server.quant.packing import PackedLinear, quantization_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lowbit_server.quant.layout import Block
    from lowbit_server.quant.schemes import RtnScheme


class RtnMethod(Stateless):
    """Spreads each group's grid from its smallest to its largest weight, zero included."""

    def __init__(self, scheme: RtnScheme, device: str) -> None:
        """Quantize on a device."""
        self._scheme = scheme
        self._device = device

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each linear layer as the tensors of a `PackedLinear`.

        Raises INVALID_FIELD for a weight whose scale is beyond fp16 or no number.
        """
        linears = {linear.weight: linear for linear in block.linears}
        for name in block.tensors:
            tensor = read(name)
            if name not in linears:
                yield name, tensor
                continue
            packed = self._quantize(name, tensor.to(self._device))
            yield from packed.tensors(linears[name].name).items()

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says about it; to all readers it is a GPTQ checkpoint."""
        return quantization_config(self._scheme)

    def _quantize(self, name: str, weight: torch.Tensor) -> PackedLinear:
        """Quantize a weight (out, in)."""
        bits, asked = self._scheme.bits, self._scheme.group_size
        size = weight.shape[1] if asked == -1 else asked
        # (groups, columns of a group, out)
        parts = weight.float().T.reshape(-1, size, len(weight))
        scales, zeros = grid(parts, bits, sym=self._scheme.sym)
        check_finite(name, scales)
        codes = nearest(parts, scales, zeros, bits)
        return PackedLinear.of(bits, codes.reshape(-1, len(weight)), zeros, scales)
