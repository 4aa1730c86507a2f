"""What tells the decoders of the Llama family apart, as numbers and flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Values of `model_type` whose layers are the same up to what `Architecture` says."""
# Angles of these do not depend on the length of the text.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding (Su et al. 2021): an angle for each pair of a head's elements."""

    frequencies: Tensor
    """Radians per position, float32 (head size / 2)."""
    scale: float
    """What sines and cosines are multiplied by."""

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (tokens, 1, head size) of positions (tokens).

        A head x turns as x * cosine + x.roll(head size / 2) * sine: the sines of its first
        half are negative.
        """
        angles = positions[:, None].float() * self.frequencies
        cosine, sine = angles.cos() * self.scale, angles.sin() * self.scale
        cosine, sine = torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)
        return cosine.to(dtype)[:, None], sine.to(dtype)[:, None]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of RMS norms, rotary embeddings, grouped-query attention and gated MLPs."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab_size: int
    context_tokens: int
    norm_epsilon: float
    tied: bool
    """Whether the output embedding is the input embedding."""
    windows: tuple[int | None, ...]
    """How many tokens back each layer sees, itself included; None for all."""
    rotary: tuple[bool, ...]
    """Which layers turn queries and keys."""
    rope: Rope


def architecture(config: PreTrainedConfig, device: str) -> Architecture | None:
    """Return what a model's configuration says, or None when it is not of the family."""
    rope = getattr(config, "rope_parameters", None) or {}
    known = (
        config.model_type in FAMILY
        and config.hidden_act == "silu"
        and rope.get("rope_type") in _ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )
    if not known:
        return None
    layers = config.num_hidden_layers
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Architecture(
        layers=layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        vocab_size=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        windows=_windows(config),
        rotary=tuple(map(bool, getattr(config, "no_rope_layers", None) or [1] * layers)),
        rope=_rope(config, head_size, device),
    )


def _windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    used = getattr(config, "use_sliding_window", True)
    window: int | None = getattr(config, "sliding_window", None) if used else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral's configuration speaks for all layers
        return (window,) * int(config.num_hidden_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(config: PreTrainedConfig, head_size: int, device: str) -> Rope:
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind != "default":
        return Rope(*ROPE_INIT_FUNCTIONS[kind](config, device))
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    return Rope(1 / parameters["rope_theta"] ** exponents, 1.0)
