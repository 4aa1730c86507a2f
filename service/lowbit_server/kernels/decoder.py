"""All layers of a decoder in one call."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit_server import kernels
from lowbit_server.kernels.products import CProduct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.kernels.attention import BlockAttention
    from lowbit_server.kernels.products import Product

# As in decode.c.
_NO_MEMORY, _DONE = 0, 1


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, CProduct) for name in ("qkv", "output", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm", "mlp_norm", "head_norms")),
        *((name, c_int64) for name in ("window", "rotary")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "inner", "head_size", "turned")),
        ("epsilon", c_double),
        ("of", ctypes.POINTER(_Layer)),
    )


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """What one layer computes with; norms are bfloat16."""

    products: tuple[Product, Product, Product, Product]
    """Of queries, keys and values; of what attention finds; of gates and ups; of those."""
    norms: tuple[Tensor, Tensor]
    """Before attention and before the MLP, (hidden)."""
    head_norms: Tensor | None
    """Of queries and keys, (heads + KV heads, head size)."""
    window: int | None
    rotary: bool


class Decoder:
    """The layers, which must outlive this: it knows where their tensors lie."""

    def __init__(
        self, layers: Sequence[DecoderLayer], shape: tuple[int, int], epsilon: float
    ) -> None:
        """Take the layers of one model, (heads + KV heads, head size) and the norms' epsilon."""
        first = layers[0]
        (_, hidden), (gates, _) = first.products[0].shape, first.products[2].shape
        self._layers = (_Layer * len(layers))(*map(_structure, layers))
        heads, size = shape
        self._structure = _Decoder(
            len(layers), hidden, gates // 2, size, heads, epsilon, self._layers
        )

    def add(
        self,
        hidden: Tensor,
        attention: BlockAttention,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        interrupt: c_int | None,
    ) -> bool:
        """Add what all layers find to hidden states, bfloat16 (tokens, hidden), in place.

        Keys and values are the blocks of each layer. Returns whether all is done: not so when
        `interrupt` became other than 0 before half of the layers were. Raises MemoryError.
        """
        pools = c_void_p * len(keys)
        library: Any = kernels.library()  # it is there, where products are
        result = library.lowbit_decode(
            ctypes.byref(self._structure),
            ctypes.byref(attention.structure),
            pools(*(one.data_ptr() for one in keys)),
            pools(*(one.data_ptr() for one in values)),
            c_void_p(hidden.data_ptr()),
            None if interrupt is None else ctypes.byref(interrupt),
        )
        if result == _NO_MEMORY:
            raise MemoryError
        return bool(result == _DONE)


def _structure(layer: DecoderLayer) -> _Layer:
    head_norms = None if layer.head_norms is None else layer.head_norms.data_ptr()
    return _Layer(
        *(product.structure for product in layer.products),
        *(norm.data_ptr() for norm in layer.norms),
        head_norms,
        layer.window or 0,
        layer.rotary,
    )
