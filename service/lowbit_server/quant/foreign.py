"""Describes the quantization of checkpoints that others made, from their config.json."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant import dynamic
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lowbit_server.quant.schemes import Scheme
    from lowbit_server.store.headers import TensorEntry

_COMPUTE_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_PACKED_BITS = 32
_AWQ_BITS = 4
_PACKED = ".qweight"
# What a quantized layer stores beside its weight; no parameters of the model.
_COMPANIONS = (
    ".SCB",
    ".weight_format",
    ".qzeros",
    ".scales",
    ".g_idx",
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".bitsandbytes__nf4",
    ".bitsandbytes__fp4",
)


def foreign_scheme(config: Mapping[str, Any], tensors: Iterable[str]) -> Scheme:
    """Return the scheme that a `quantization_config` and the tensors' names describe.

    Raises LowbitError(SOURCE_UNSUPPORTED) for methods and options that no scheme has.
    """
    try:
        match config:
            case {"load_in_8bit": True}:
                return Int8Scheme(outlier_threshold=config.get("llm_int8_threshold", 6.0))
            case {"load_in_4bit": True}:
                return Bnb4BitScheme(
                    quant_type=config.get("bnb_4bit_quant_type", "fp4"),
                    compute_type=_COMPUTE_TYPES.get(
                        config.get("bnb_4bit_compute_dtype", "float32")
                    ),
                    double_quant=config.get("bnb_4bit_use_double_quant", False),
                )
            case {"quant_method": "gptq", "checkpoint_format": str(layout)} if layout != "gptq":
                pass
            # Our own, exported and imported again: plain GPTQ to everyone else.
            case {"quant_method": "gptq", "meta": {"method": "rtn"}}:
                return RtnScheme(
                    bits=config["bits"], group_size=config["group_size"], sym=config["sym"]
                )
            case {"quant_method": "gptq"}:
                return GptqScheme(
                    bits=config["bits"],
                    group_size=config["group_size"],
                    desc_act=config.get("desc_act", False),
                    sym=config.get("sym", True),
                    damp=config.get("damp_percent") or 0.01,
                    layers=dynamic.mixed_layers(config, _quantized(tensors)),
                )
            case {"quant_method": "awq", "bits": 4} if _awq_version(config) == "gemm":
                return AwqScheme(
                    group_size=config["group_size"], zero_point=config.get("zero_point", True)
                )
    except (KeyError, ValidationError, AttributeError, TypeError, re.error) as error:
        raise _unsupported(config) from error
    raise _unsupported(config)


def grouped_bits(config: Mapping[str, Any], name: str) -> int:
    """Return the bits of a layer whose weight is packed in words (`qweight`)."""
    return _AWQ_BITS if config.get("quant_method") == "awq" else dynamic.bits_of(config, name)


def stored_parameters(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> int:
    """Return how many parameters the tensors of a quantized checkpoint stand for."""
    total = 0
    for name, entry in entries.items():
        if name.endswith(_COMPANIONS):
            continue
        if name.endswith(_PACKED):
            bits = grouped_bits(config, name.removesuffix(_PACKED))
            total += entry.elements * _PACKED_BITS // bits
        elif entry.dtype == "U8" and config.get("load_in_4bit"):
            total += entry.elements * 2
        else:
            total += entry.elements
    return total


def _quantized(tensors: Iterable[str]) -> list[str]:
    return [name.removesuffix(_PACKED) for name in tensors if name.endswith(_PACKED)]


def _awq_version(config: Mapping[str, Any]) -> str:
    # AutoAWQ's name and those of its successors.
    keys = ("version", "format", "checkpoint_format")
    found = (config[key] for key in keys if config.get(key) is not None)
    return str(next(found, "gemm")).lower()


def _unsupported(config: object) -> LowbitError:
    return LowbitError(
        Reason.SOURCE_UNSUPPORTED,
        f"the source's quantization is none that can be served: {config!r}"[:500],
    )
