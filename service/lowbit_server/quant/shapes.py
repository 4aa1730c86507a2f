"""Which shapes of linear layers each scheme can take. Imports no torch: the front asks, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.errors import invalid
from lowbit_server.quant.schemes import AwqScheme, Bnb4BitScheme, GptqScheme, RtnScheme

if TYPE_CHECKING:
    from lowbit_server.quant.schemes import Scheme

# Codes of 2, 3, 4 and 8 bits fill whole 32-bit words in runs of so many.
_GPTQ_RUN = 32
# 4-bit codes that share a word (`quant.awq_packing`).
_AWQ_LANES = 8
# What the kernels of bitsandbytes assert: rows in tiles, columns in blocks of one scale.
_BNB_TILE = 32
_BNB_BLOCK = 64


def check_shape(scheme: Scheme, layer: str, rows: int, columns: int) -> None:
    """Raise INVALID_FIELD that names a layer whose weight (rows, columns) a scheme cannot take."""
    match scheme:
        case GptqScheme() | RtnScheme():
            tile, width = _GPTQ_RUN, max(scheme.group_size, _GPTQ_RUN)
        case AwqScheme():
            tile, width = _AWQ_LANES, max(scheme.group_size, 1)
        case Bnb4BitScheme():
            tile, width = _BNB_TILE, _BNB_BLOCK
        case _:
            return
    if rows % tile or columns % width:
        groups = f" with groups of {width}" if getattr(scheme, "group_size", -1) > 0 else ""
        raise invalid(
            "scheme",
            f"{scheme.name}{groups} needs rows in multiples of {tile} and columns in multiples "
            f"of {width}; layer {layer} has {rows} x {columns}",
        )
