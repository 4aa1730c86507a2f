"""Round to nearest: each weight goes to the nearest point of its group's grid.

The yardstick of the calibrated methods, in the same layout. Imports torch: for job
processes only.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from lowbit_server.errors import invalid
from lowbit_server.quant.method import Stateless
from lowbit_server.quant.packing import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lowbit_server.quant.layout import Block
    from lowbit_server.quant.schemes import GptqScheme, RtnScheme


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


def check_finite(name: str, scales: torch.Tensor) -> None:
    """Raise INVALID_FIELD that names a weight whose grid fp16 cannot hold."""
    if not bool(scales.isfinite().all()):
        raise invalid(
            "scheme", f"tensor {name} has infinities, no numbers or steps beyond fp16's 65504"
        )


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


def grid(parts: torch.Tensor, bits: int, *, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales fp16 and zero points int32 (groups, out) of weights (groups, size, out).

    The grid reaches to half a step of every weight.
    """
    return between(parts.amin(dim=1), parts.amax(dim=1), bits, sym=sym)


def between(
    low: torch.Tensor, high: torch.Tensor, bits: int, *, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales fp16 and zero points int32 of grids from `low` to `high`, all (groups, out).

    Zero is on every grid, and its ends are no further than half a step within. Scales round
    up for that, as one that rounds down would leave the outermost weights outside. Zero
    points begin at 1 (see `PackedLinear.of`), so the scale also spans from zero to the
    largest weight without the grid's lowest point.
    """
    last = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    # Without the sign of a negative zero, from whose bits the next one would be negative.
    wanted = torch.maximum((high - low) / last, high / (last - 0.5)).abs()
    scales = wanted.to(torch.float16)
    # The next fp16 is the next integer in its bits. A group of zeros gets a step, too.
    above = (scales.view(torch.int16) + 1).view(torch.float16)
    scales = torch.where((scales.float() < wanted) | (scales == 0), above, scales)
    if sym:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32)
    else:
        zeros = (-low / scales.float()).round().clamp(1, last).to(torch.int32)
    return scales, zeros


def nearest(
    parts: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return the codes uint8 (groups, size, out) of the grid points nearest to weights."""
    steps = (parts / scales.float()[:, None]).round() + zeros[:, None]
    return steps.clamp(0, 2**bits - 1).to(torch.uint8)
