"""Brings a model of the store onto a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import transformers

from lowbit_server.kernels import products
from lowbit_server.models.architecture import architecture
from lowbit_server.models.checkpoint import Checkpoint
from lowbit_server.models.fused import FusedModel
from lowbit_server.models.transformers import TransformersModel, place

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

    from lowbit_server.models.decoder import DecoderModel


def load(folder: Path, device: str, context_tokens: int) -> DecoderModel:
    """Return the model of a folder: fused where it can be, else on transformers' modules.

    Never runs code from the folder and never asks the network. Raises OSError, ValueError
    and LowbitError for a bad folder, torch.OutOfMemoryError or MemoryError without room.
    """
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    shape = architecture(config, device)
    if shape is None or not _has_kernels(config, device):
        return TransformersModel(place(folder, device), context_tokens)
    with Checkpoint(folder, config, device) as checkpoint:
        return FusedModel(shape, checkpoint, context_tokens)


def _has_kernels(config: PreTrainedConfig, device: str) -> bool:
    """Return whether the fused decoder has kernels for a checkpoint's scheme on a device."""
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") != "bitsandbytes":
        return True
    if quantization.get("load_in_8bit"):
        return device == "cpu"
    return device == "cpu" and products.are_there()
