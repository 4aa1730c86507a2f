"""The seam between the engine and whatever computes logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

CHUNK_TOKENS = 512
"""Prompts are read in chunks of at most this size, one a step (`engine.pacing`). Larger
chunks gain little throughput."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: keys and values of some heads."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the engine must know of a model. `dtype` is that of keys and values."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    context_tokens: int
    vocab_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        elements = sum(one.heads * (one.key_dim + one.value_dim) for one in self.layers)
        return elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward pass and the KV cache of their rows.

    `tokens` are rows of equal length; several rows have one token each. `starts` says
    how many tokens of each row are in the cache already, which is where the new ones go.
    `keys` and `values` have one tensor a layer, (rows, heads, capacity, key or value
    dim); the model writes the new tokens' into them. What lies beyond a row's tokens is
    finite but means nothing.
    """

    tokens: Sequence[Sequence[int]]
    starts: Sequence[int]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


class DecoderModel(Protocol):
    """A decoder-only language model whose state is a KV cache."""

    @property
    def spec(self) -> ModelSpec:
        """What the engine must know."""

    @property
    def live_bytes(self) -> int:
        """Bytes of its weights in memory, measured after a first use."""

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits after each row's last token, (rows, vocabulary) float32."""

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits after every token, (rows, tokens, vocabulary), as computed."""
