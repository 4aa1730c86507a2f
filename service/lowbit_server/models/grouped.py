"""Checkpoints in the GPTQ layout: grouped low-bit weights, without gptqmodel.

transformers leaves such layers to gptqmodel, an optional and heavy package. Torch's own
int4 kernel does the common case on a CPU directly (docs/adr/0008).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from lowbit_server.quant.foreign import gptq_bits
from lowbit_server.quant.packing import WORD_BITS, PackedLinear
from lowbit_server.store.sources import shards
from lowbit_server.store.tensors import ALIGNMENT_BYTES, TensorReader

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

PACKED_ROWS = 96
"""Up to this many rows the int4 kernel beats a dense product of the dequantized weight."""
_KERNEL_BITS = 4
_KERNEL_GROUPS = {32, 64, 128}
# The kernel's codes count from the middle of the grid.
_KERNEL_ZERO = 8
# A parameter of the CUDA kernel; the one for CPUs ignores it.
_INNER_TILES = 2
_PACKED = ".qweight"
# Some older checkpoints store what the configuration determines.
_IGNORED = "rotary_emb.inv_freq"


class GroupedLinear(nn.Module):
    """y = x W^T + bias with W kept at 4 bits, on torch's int4 kernel for CPUs."""

    packed: Tensor
    scales_and_zeros: Tensor
    qweight: Tensor
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: PackedLinear, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Take a layer that `has_kernel`."""
        super().__init__()
        groups, out_features = layer.scales.shape
        self.group_size = len(layer.g_idx) // groups
        codes = layer.codes().T.to(torch.int32).contiguous()
        scales, zeros = layer.scales.float(), layer.zeros()
        # The kernel's weight is (code - 8) * scale + zero, in the inputs' type.
        pairs = torch.stack([scales, (_KERNEL_ZERO - zeros) * scales], dim=-1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES)  # noqa: SLF001
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", pairs.to(dtype).contiguous())
        # The codes once more, in the mapped file: the kernel's own order depends on the CPU.
        self.register_buffer("qweight", layer.qweight)
        self.register_buffer("zeros", zeros.to(dtype).view(groups, 1, out_features))
        self.register_buffer("scales", scales.to(dtype).view(groups, 1, out_features))
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (..., out) of inputs (..., in), both in the model's dtype."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if len(rows) <= PACKED_ROWS:
            product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001
                rows, self.packed, self.group_size, self.scales_and_zeros
            )
        else:
            product = rows @ self._dequantized()
        if self.bias is not None:
            product += self.bias
        return product.reshape(*inputs.shape[:-1], -1)

    def _dequantized(self) -> Tensor:
        """Return the transposed weight (in, out); each element is rounded once."""
        words, out_features = self.qweight.shape
        lanes = WORD_BITS // _KERNEL_BITS
        shape = words, lanes, out_features
        weight = torch.empty(shape, dtype=self.scales.dtype, device=self.scales.device)
        for lane in range(lanes):
            weight[:, lane] = (self.qweight >> (_KERNEL_BITS * lane)) & (2**_KERNEL_BITS - 1)
        # Small integers and their differences are exact in every type.
        grouped = weight.view(-1, self.group_size, out_features)
        return grouped.sub_(self.zeros).mul_(self.scales).view(-1, out_features)


def has_kernel(layer: PackedLinear) -> bool:
    """Return whether the int4 kernel takes a layer."""
    return (
        layer.qweight.device.type == "cpu"
        and layer.bits == _KERNEL_BITS
        and layer.group_size in _KERNEL_GROUPS
    )


def grouped_layer(layer: PackedLinear, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """Return a module for a layer on its device.

    Without a kernel (2, 3 and 8 bits, whole channels, groups in another order, CUDA) the
    weight is dequantized once, here: as fast as the source model, and as large.
    """
    if has_kernel(layer):
        return GroupedLinear(layer, bias, dtype)
    weight = layer.dequantized(dtype)
    with torch.device("meta"):
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense


def is_grouped(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint is in the GPTQ layout."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") == "gptq"


def load_grouped(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a checkpoint in the GPTQ layout; tensors stay mapped files where they can.

    Raises ValueError and OSError for a folder whose tensors do not fit its architecture.
    """
    bits = gptq_bits(config.quantization_config)
    del config.quantization_config  # or transformers would look for gptqmodel
    # Parameters without memory, but buffers such as rotary frequencies as they should be.
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with TensorReader(shards(folder)) as reader:
        rest = _place_layers(model, reader, bits, dtype, device)
    try:
        unexpected = model.load_state_dict(rest, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:  # what torch raises for a wrong shape
        raise ValueError(str(error)) from error
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unexpected or missing:
        wrong = ", ".join([*unexpected, *missing][:5])
        raise ValueError(f"the checkpoint does not fit its architecture: {wrong}")
    model.to(device)
    return model


def _place_layers(
    model: PreTrainedModel, reader: TensorReader, bits: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Replace the model's quantized layers; return the other tensors."""
    names = set(reader.entries)

    def read(name: str) -> Tensor:
        if name not in names:
            raise ValueError(f"the checkpoint has no {name}")
        names.remove(name)
        tensor = reader.tensor(name)
        if tensor.data_ptr() % ALIGNMENT_BYTES:  # kernels may crash on it (see `store.tensors`)
            tensor = tensor.clone()
        plain = name.endswith((".weight", ".bias"))
        return tensor.to(device, dtype) if plain else tensor.to(device)

    for name in [key.removesuffix(_PACKED) for key in reader.entries if key.endswith(_PACKED)]:
        keys = ("qweight", "qzeros", "scales", "g_idx")
        layer = PackedLinear(bits, *(read(f"{name}.{key}") for key in keys))
        try:
            linear = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the architecture has no layer {name}") from error
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is no linear layer")  # noqa: TRY004  (the file is wrong)
        layer.check(name, linear.out_features, linear.in_features)
        bias = read(f"{name}.bias") if f"{name}.bias" in names else None
        if bias is None and linear.bias is not None:
            raise ValueError(f"the checkpoint has no {name}.bias")
        model.set_submodule(name, grouped_layer(layer, bias, dtype))
    return {name: read(name) for name in sorted(names) if not name.endswith(_IGNORED)}
