"""A method turns one block's tensors into those of a scheme; here is which does which.

Imports torch: for job processes only. A method sees whole blocks in order, so that one
with calibration can carry the activations from layer to layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.bnb4bit import Bnb4BitMethod
from lowbit_server.quant.int8 import Int8Method
from lowbit_server.quant.rtn import RtnMethod
from lowbit_server.quant.schemes import Bnb4BitScheme, FloatScheme, Int8Scheme, RtnScheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lowbit_server.quant.layout import Block, Linear
    from lowbit_server.quant.schemes import Scheme


class Method(Protocol):
    """Quantizes a model block by block."""

    def check(self, linears: Sequence[Linear]) -> None:
        """Raise INVALID_FIELD, before work starts, that names a layer it cannot take."""

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of a block; `read` returns one of the source's."""

    def quantization_config(self) -> dict[str, Any] | None:
        """Return what config.json says about it, as transformers writes it."""


class FloatMethod:
    """Keeps every tensor; the cast happens where tensors are read."""

    def check(self, linears: Sequence[Linear]) -> None:
        """Take every layer."""

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the block's tensors."""
        for name in block.tensors:
            yield name, read(name)

    def quantization_config(self) -> None:
        """Return nothing: floating-point weights need no words."""


def method(scheme: Scheme, device: str) -> Method:
    """Return the method of a scheme; raises SCHEME_UNAVAILABLE."""
    match scheme:
        case FloatScheme():
            return FloatMethod()
        case Int8Scheme():
            return Int8Method(scheme, device)
        case Bnb4BitScheme():
            return Bnb4BitMethod(scheme, device)
        case RtnScheme():
            return RtnMethod(scheme, device)
    raise LowbitError(Reason.SCHEME_UNAVAILABLE, f"{scheme.name} has no method in this version")
