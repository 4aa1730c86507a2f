"""The seam between the engine and whatever computes logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import c_int

    import torch
    from torch import Tensor

CHUNK_TOKENS = 512
"""Prompts are read in chunks of at most this size, one a step (`engine.pacing`). Larger
chunks gain little throughput."""
BLOCK_TOKENS = 32
"""Tokens in a block of the KV cache: what a sequence may waste, and the grain in which
beginnings of prompts are found again."""


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
    mixes: bool = False
    """Whether chunks of prompts take less time in one pass with the tokens of streams."""

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one token takes in all layers."""
        elements = sum(one.heads * (one.key_dim + one.value_dim) for one in self.layers)
        return elements * self.dtype.itemsize


def blocks_of(tokens: int) -> int:
    """Return how many blocks hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence whose first `start` tokens are in the KV cache.

    Its token t is, or is put, in block `blocks[t // BLOCK_TOKENS]` at t % BLOCK_TOKENS. The
    logits after its last `wanted` new tokens are asked for.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    wanted: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes, and the KV cache.

    `keys` and `values` have one tensor a layer, (blocks, heads, BLOCK_TOKENS, key or value
    dim); the model writes the new tokens' into them. What a block has beyond its sequence's
    tokens is finite but means nothing.
    """

    spans: Sequence[Span]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    interrupt: c_int | None = None
    """Another thread makes it other than 0 to have the pass end early, where a model can."""


class InterruptedPassError(Exception):
    """A pass was ended early; what it wrote of the new tokens is written again by the next."""


class DecoderModel(Protocol):
    """A decoder-only language model whose state is a KV cache."""

    @property
    def spec(self) -> ModelSpec:
        """What the engine must know."""

    @property
    def live_bytes(self) -> int:
        """Bytes of its weights in memory, measured after a first use."""

    def forward(self, batch: Batch) -> Tensor:
        """Return all logits that are wanted, (tokens, vocabulary), as computed.

        Raises InterruptedPassError when the batch was interrupted.
        """
