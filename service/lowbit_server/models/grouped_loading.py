"""Loads checkpoints in the layouts of GPTQ and AWQ into transformers' modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from lowbit_server.models.linears import linear
from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.foreign import foreign_scheme, grouped_bits
from lowbit_server.quant.packing import PackedLinear
from lowbit_server.store.sources import shards
from lowbit_server.store.tensors import ALIGNMENT_BYTES, TensorReader

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import Any

    from transformers import PreTrainedConfig, PreTrainedModel

    from lowbit_server.models.weights import GroupedWeight

_PACKED = ".qweight"
IGNORED = "rotary_emb.inv_freq"
"""How names end of what some older checkpoints store and the configuration determines."""


def is_grouped(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint is in the layout of GPTQ or AWQ."""
    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") in {"gptq", "awq"}


def load_grouped(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a checkpoint in the layout of GPTQ or AWQ; what is not quantized stays mapped.

    Raises ValueError and OSError for a folder whose tensors do not fit its architecture,
    LowbitError(SOURCE_UNSUPPORTED) for a layout that is none of these.
    """
    quantization = config.quantization_config
    del config.quantization_config  # or transformers would look for gptqmodel
    # Parameters without memory, but buffers such as rotary frequencies as they should be.
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with TensorReader(shards(folder)) as reader:
        foreign_scheme(quantization, reader.entries)  # raises for layouts that are none of these
        rest = _place_layers(model, reader, quantization, dtype, device)
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
    model: PreTrainedModel,
    reader: TensorReader,
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
    device: str,
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
        layer = read_grouped(name, quantization, read)
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"the architecture has no layer {name}") from error
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is no linear layer")  # noqa: TRY004  (the file is wrong)
        layer.check(name, module.out_features, module.in_features)
        bias = read(f"{name}.bias") if f"{name}.bias" in names else None
        if bias is None and module.bias is not None:
            raise ValueError(f"the checkpoint has no {name}.bias")
        model.set_submodule(name, linear([layer], None if bias is None else [bias], dtype))
    return {name: read(name) for name in sorted(names) if not name.endswith(IGNORED)}


def read_grouped(
    name: str, quantization: Mapping[str, Any], read: Callable[[str], Tensor]
) -> GroupedWeight:
    """Return the layer of a name, whose tensors `read` gives, in the checkpoint's layout."""
    if quantization["quant_method"] == "awq":
        return AwqLinear(*(read(f"{name}.{key}") for key in AwqLinear.keys))
    parts = (read(f"{name}.{key}") for key in PackedLinear.keys)
    return PackedLinear(grouped_bits(quantization, name), *parts)
