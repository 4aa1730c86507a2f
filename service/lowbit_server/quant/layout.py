"""The parts of a checkpoint in the order in which they are quantized.

Imports transformers: for job processes only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer that is quantized: its module's name and its weight's (out, in)."""

    name: str
    out_features: int
    in_features: int

    @property
    def weight(self) -> str:
        """Name of its weight in the checkpoint."""
        return f"{self.name}.weight"


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder layer, or what belongs to none: names of its tensors, linear layers."""

    name: str
    tensors: tuple[str, ...]
    linears: tuple[Linear, ...] = ()


def blocks(names: Iterable[str], linears: Iterable[Linear] = ()) -> list[Block]:
    """Group a checkpoint's tensors: what belongs to no layer first, then layer by layer."""
    tensors: dict[str, list[str]] = {"": []}
    for name in names:
        tensors.setdefault(_layer_of(name), []).append(name)
    parts: dict[str, list[Linear]] = {key: [] for key in tensors}
    for linear in linears:
        parts[_layer_of(linear.weight)].append(linear)
    return [
        Block(key, tuple(sorted(tensors[key])), tuple(parts[key]))
        for key in sorted(tensors, key=_in_number_order)
    ]


def linear_layers(folder: Path, names: Collection[str]) -> list[Linear]:
    """Return the linear layers that transformers quantizes in the model of a folder.

    They are the `nn.Linear` modules of the architecture, built without memory, except for
    the output embedding and whatever else transformers itself keeps in full precision, so
    that it finds the structure it expects when it loads the result.

    Raises LowbitError(SOURCE_UNSUPPORTED) when the architecture cannot be built or the
    checkpoint's tensors, `names`, do not fit to it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415  (3 s)
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415
    from transformers.quantizers.base import HfQuantizer  # noqa: PLC0415
    from transformers.quantizers.quantizers_utils import should_convert_module  # noqa: PLC0415

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        message = f"the architecture of {folder.name} cannot be built: {error}"
        raise LowbitError(Reason.SOURCE_UNSUPPORTED, message[:500]) from error
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # noqa: SLF001
    found = []
    for name, module in model.named_modules():
        if not should_convert_module(name, kept):
            continue
        if isinstance(module, Conv1D):
            message = f"{name} is a transposed linear layer (Conv1D), which cannot be quantized"
            raise LowbitError(Reason.SOURCE_UNSUPPORTED, message)
        if type(module) is torch.nn.Linear:
            found.append(Linear(name, module.out_features, module.in_features))
    for linear in found:
        if linear.weight not in names:
            message = f"the checkpoint has no {linear.weight}, which its architecture has"
            raise LowbitError(Reason.SOURCE_UNSUPPORTED, message)
    return found


def _layer_of(name: str) -> str:
    match = _LAYER.match(name)
    return match[1] if match else ""


def _in_number_order(key: str) -> list[tuple[int, str]]:
    """Sort "layers.10" after "layers.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
