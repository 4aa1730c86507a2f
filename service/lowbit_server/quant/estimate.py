"""What a model would take, from config.json and the headers of its weights alone.

Imports no torch: the front asks. `tests/models/test_estimate.py` compares with what is measured,
so a change of how a scheme is stored or served shows there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowbit_server.errors import invalid
from lowbit_server.hardware import multiplies_bfloat16
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    FloatScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
)
from lowbit_server.quant.shapes import check_shape
from lowbit_server.store.headers import DTYPE_BITS, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lowbit_server.quant.schemes import FloatType, Scheme

    Entries = Mapping[str, TensorEntry]

FLOAT_NAMES: Mapping[FloatType, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_CONFIG_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_LAYER = re.compile(r".*?\.(\d+)\.")
_HEAD = "lm_head.weight"
_WORD_BITS = 32
_BNB_BLOCK = 64
_BNB_NESTED_BLOCK = 256
# The JSON with its shape and types that bitsandbytes keeps with each layer.
_BNB_STATE_BYTES = 171
# Those of `models.nibbles`, which imports torch.
_KERNEL_GROUPS = (128, 64, 32)
_KERNEL_ROWS = 16
_PLANE_BITS = 4
# A scale in float32 and a point of 16 bits.
_GRID_BYTES = 6
_BF16_BYTES = 2
_FILE_HEADER_BYTES = 4096
_TENSOR_HEADER_BYTES = 256
_TENSORS_PER_LINEAR = 6


@dataclass(frozen=True, slots=True)
class Shape:
    """Config values that memory depends on."""

    layers: int
    kv_heads: int
    head_dim: int
    tied: bool
    """Whether the output embedding is the input embedding."""
    dtype: str
    """Type of the weights that are not quantized, as safetensors calls it."""

    @staticmethod
    def of(config: Mapping[str, Any], entries: Entries) -> Shape:
        """Read them from the text part of config.json; raises KeyError where it lacks one."""
        heads = config["num_attention_heads"]
        dtype = config.get("dtype") or config.get("torch_dtype")
        return Shape(
            layers=config["num_hidden_layers"],
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            # What transformers takes when a config does not say.
            tied=config.get("tie_word_embeddings", _HEAD not in entries),
            dtype=_CONFIG_NAMES.get(str(dtype)) or _most_common_float(entries),
        )

    def of_type(self, kind: FloatType) -> Shape:
        """Return the shape of the same model cast to another type."""
        return replace(self, dtype=FLOAT_NAMES[kind])

    def live_dtype(self, device: str) -> str:
        """Return the type on a device: fp16 is float32 on a CPU (`models.transformers`)."""
        return "F32" if device == "cpu" and self.dtype == "F16" else self.dtype

    def kv_bytes_per_token(self, device: str) -> int:
        """Return the bytes of keys and values of one token in all layers."""
        elements = 2 * self.layers * self.kv_heads * self.head_dim
        return elements * DTYPE_BITS[self.live_dtype(device)] // 8


def linear_names(entries: Entries) -> list[str]:
    """Return the weights that are quantized: matrices inside decoder layers."""
    return [
        name
        for name, entry in entries.items()
        if name.endswith(".weight") and len(entry.shape) == 2 and _LAYER.match(name)  # noqa: PLR2004
    ]


def quantized(entries: Entries, scheme: Scheme) -> dict[str, TensorEntry]:
    """Return the tensors that a floating-point checkpoint has once it is in a scheme.

    Raises LowbitError(INVALID_FIELD) for a layer that the scheme's layout cannot take, or
    bits of a decoder layer that does not exist.
    """
    found: dict[str, TensorEntry] = {}
    linears = set() if isinstance(scheme, FloatScheme) else set(linear_names(entries))
    _check_layers(linears, scheme)
    for name, entry in entries.items():
        if name in linears:
            rows, columns = entry.shape
            check_shape(scheme, name.removesuffix(".weight"), rows, columns)
            found |= dict(_stored(name, rows, columns, scheme))
        elif isinstance(scheme, FloatScheme) and entry.dtype in FLOAT_NAMES.values():
            found[name] = _entry(FLOAT_NAMES[scheme.type], *entry.shape)
        else:
            found[name] = entry
    return found


def disk_bytes(source: Entries, result: Entries, scheme: Scheme) -> int:
    """Return the bytes of the weight file that a job writes (`store.tensors`)."""
    linears = 0 if isinstance(scheme, FloatScheme) else len(linear_names(source))
    room = len(source) + _TENSORS_PER_LINEAR * linears
    header = _FILE_HEADER_BYTES + _TENSOR_HEADER_BYTES * room
    return header + sum(entry.bytes for entry in result.values())


def live_bytes(entries: Entries, scheme: Scheme, shape: Shape, device: str) -> int:
    """Return the bytes that a checkpoint's tensors take on a device once they are served."""
    size = DTYPE_BITS[shape.live_dtype(device)] // 8
    total = 0
    for name, entry in entries.items():
        stem, _, kind = name.rpartition(".")
        if shape.tied and name == _HEAD:
            continue
        if kind == "qweight":
            total += _grouped_bytes(stem, entries, scheme, size, device)
        elif kind in {"qzeros", "g_idx", "weight_format"} or f"{stem}.qweight" in entries:
            # Part of the layer, but for a bias, which is stored as any other tensor is.
            total += entry.elements * size if kind == "bias" else 0
        elif kind == "SCB":
            served = device == "cpu" and not _has_products(size)
            total += entry.elements * (size if served else 4)
        elif entry.dtype == "U8" and kind == "weight":
            total += entry.bytes + _bnb_scale_bytes(name, entries, device)
        elif entry.dtype in _CONFIG_NAMES.values() and not _is_bnb_state(name):
            total += entry.elements * size
        elif entry.dtype == "I8":
            total += entry.bytes
    return total


def _check_layers(linears: Iterable[str], scheme: Scheme) -> None:
    if not isinstance(scheme, GptqScheme):
        return
    numbers = {int(match[1]) for name in linears if (match := _LAYER.match(name))}
    given = [one.layer for one in scheme.layers]
    if wrong := sorted({one for one in given if one not in numbers or given.count(one) > 1}):
        raise invalid(
            "scheme.gptq.layers",
            f"the decoder layers are 0 to {max(numbers, default=-1)}, each named once; "
            f"wrong is {wrong[0]}",
        )


def _stored(
    name: str, rows: int, columns: int, scheme: Scheme
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield what a weight (rows, columns) becomes."""
    stem = name.removesuffix(".weight")
    match scheme:
        case Int8Scheme():
            yield name, _entry("I8", rows, columns)
            yield f"{stem}.SCB", _entry("F32", rows)
            yield f"{stem}.weight_format", _entry("U8")
        case Bnb4BitScheme():
            blocks = rows * columns // _BNB_BLOCK
            yield name, _entry("U8", rows * columns // 2, 1)
            yield f"{name}.absmax", _entry("U8" if scheme.double_quant else "F32", blocks)
            yield f"{name}.quant_map", _entry("F32", 16)
            if scheme.double_quant:
                nested = math.ceil(blocks / _BNB_NESTED_BLOCK)
                yield f"{name}.nested_absmax", _entry("F32", nested)
                yield f"{name}.nested_quant_map", _entry("F32", 256)
            state = f"quant_state.bitsandbytes__{scheme.quant_type}"
            yield f"{name}.{state}", _entry("U8", _BNB_STATE_BYTES)
        case GptqScheme() | RtnScheme():
            bits = _bits(name, scheme)
            groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
            yield f"{stem}.qweight", _entry("I32", columns * bits // _WORD_BITS, rows)
            yield f"{stem}.qzeros", _entry("I32", groups, rows * bits // _WORD_BITS)
            yield f"{stem}.scales", _entry("F16", groups, rows)
            yield f"{stem}.g_idx", _entry("I32", columns)
        case AwqScheme():
            groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
            yield f"{stem}.qweight", _entry("I32", columns, rows * 4 // _WORD_BITS)
            yield f"{stem}.qzeros", _entry("I32", groups, rows * 4 // _WORD_BITS)
            yield f"{stem}.scales", _entry("F16", groups, rows)


def _grouped_bytes(stem: str, entries: Entries, scheme: Scheme, size: int, device: str) -> int:
    """Return what a layer in the layouts of GPTQ and AWQ takes (`models.linears`)."""
    bits = _bits(stem, scheme)
    groups, rows = entries[f"{stem}.scales"].shape
    elements = entries[f"{stem}.qweight"].elements * _WORD_BITS // bits
    columns = elements // rows
    if device == "cpu" and _has_products(size) and not rows % _KERNEL_ROWS:
        return math.ceil(bits / _PLANE_BITS) * elements // 2 + groups * rows * _GRID_BYTES
    group = next((one for one in _KERNEL_GROUPS if columns // groups % one == 0), None)
    if device != "cpu" or group is None or rows % _KERNEL_ROWS:
        return elements * size  # dequantized
    # Two codes a byte, and a scale and a zero for each of the kernel's groups.
    planes = math.ceil(bits / _PLANE_BITS)
    return planes * (elements // 2 + 2 * elements // group * size)


def _bnb_scale_bytes(name: str, entries: Entries, device: str) -> int:
    if device == "cpu":  # one number a block: float32 in our products, bfloat16 in its kernels
        return entries[name].bytes * 2 // _BNB_BLOCK * (4 if multiplies_bfloat16() else 2)
    return sum(entry.bytes for key, entry in entries.items() if key.startswith(f"{name}."))


def _is_bnb_state(name: str) -> bool:
    return ".weight." in name


def _bits(name: str, scheme: Scheme) -> int:
    if not isinstance(scheme, GptqScheme | RtnScheme):
        return 4
    layers = scheme.layers if isinstance(scheme, GptqScheme) else ()
    match = _LAYER.match(f"{name}.")
    number = int(match[1]) if match else -1
    return next((one.bits for one in layers if one.layer == number), scheme.bits)


def _entry(dtype: str, *shape: int) -> TensorEntry:
    return TensorEntry(dtype, shape, 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)


def _most_common_float(entries: Entries) -> str:
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if entry.dtype in _CONFIG_NAMES.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.elements
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")


def _has_products(size: int) -> bool:
    """Return whether a CPU serves a model with numbers of so many bytes on `models.products`."""
    return size == _BF16_BYTES and multiplies_bfloat16()
