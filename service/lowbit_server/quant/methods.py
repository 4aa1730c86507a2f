"""Which method makes which scheme. Imports torch: for job processes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.awq import AwqMethod
from lowbit_server.quant.bnb4bit import Bnb4BitMethod
from lowbit_server.quant.gptq import GptqMethod
from lowbit_server.quant.int8 import Int8Method
from lowbit_server.quant.method import Stateless
from lowbit_server.quant.rtn import RtnMethod
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    FloatScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from lowbit_server.quant.calibration import Samples
    from lowbit_server.quant.layout import Block
    from lowbit_server.quant.method import Method
    from lowbit_server.quant.schemes import Scheme


class FloatMethod(Stateless):
    """Keeps every tensor; the cast happens where tensors are read."""

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the block's tensors."""
        for name in block.tensors:
            yield name, read(name)

    def quantization_config(self) -> None:
        """Return nothing: floating-point weights need no words."""


def method(scheme: Scheme, device: str, source: Path, samples: Samples | None) -> Method:
    """Return the method of a scheme; raises SCHEME_UNAVAILABLE.

    `source` is the folder of the model; calibrated methods see `samples` of its tokens.
    """
    match scheme:
        case FloatScheme():
            return FloatMethod()
        case Int8Scheme():
            return Int8Method(scheme, device)
        case Bnb4BitScheme():
            return Bnb4BitMethod(scheme, device)
        case RtnScheme():
            return RtnMethod(scheme, device)
        case GptqScheme() if samples:
            return GptqMethod(scheme, source, samples, device)
        case AwqScheme() if samples:
            return AwqMethod(scheme, source, samples, device)
    raise LowbitError(Reason.SCHEME_UNAVAILABLE, f"{scheme.name} has no method in this version")
