"""The memory of keys and values: blocks of tokens, which sequences share and find again.

Whole blocks whose tokens are known can be found by what they hold: a sequence that begins
like an earlier one begins with its blocks. Those that nobody uses stay until room is needed,
and go in the order of their last use.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from lowbit_server.hardware import advise
from lowbit_server.models.decoder import BLOCK_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from lowbit_server.models.decoder import ModelSpec

# Memory is touched so many blocks at a time, when it is first needed.
_GROWTH_BLOCKS = 16
_DIGEST_BYTES = 16


class KvCache:
    """Blocks of `BLOCK_TOKENS` tokens, counted by who holds them."""

    def __init__(self, spec: ModelSpec, budget_bytes: int) -> None:
        """Reserve as many blocks as fit into the budget.

        On a CPU memory that was never needed is not taken. Raises torch.OutOfMemoryError
        or RuntimeError without room.
        """
        self._block_bytes = spec.token_bytes * BLOCK_TOKENS
        self.blocks = budget_bytes // self._block_bytes

        def empty(heads: int, dim: int) -> Tensor:
            shape = (self.blocks, heads, BLOCK_TOKENS, dim)
            pool = torch.empty(shape, dtype=spec.dtype, device=spec.device)
            if spec.device.type == "cpu":
                # Clearing a large page when it is first touched takes long, and all layers'
                # pools reach their next page in the same step.
                advise(pool.data_ptr(), pool.nbytes, "MADV_NOHUGEPAGE")
            return pool

        self.keys = [empty(one.heads, one.key_dim) for one in spec.layers]
        self.values = [empty(one.heads, one.value_dim) for one in spec.layers]
        self._holders = [0] * self.blocks
        self._touched = 0
        self._free: list[int] = []
        # Blocks without holders that can be found, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._digests: dict[int, bytes] = {}
        self._found: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Number of blocks that can be taken."""
        return self.blocks - self._touched + len(self._free) + len(self._idle)

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks that hold something, used or kept to be found again."""
        return (self._touched - len(self._free)) * self._block_bytes

    def take(self, count: int) -> list[int]:
        """Return blocks that nobody else has, at most `available` ones; they hold numbers."""
        if len(self._free) < count and self._touched < self.blocks:
            self._touch(count - len(self._free))
        while len(self._free) < count:
            block, _ = self._idle.popitem(last=False)
            del self._found[self._digests.pop(block)]
            self._free.append(block)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a holder to each of these blocks."""
        for block in blocks:
            self._holders[block] += 1
            self._idle.pop(block, None)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take a holder off each of these blocks, of which a sequence's first live longest."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._digests:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def publish(self, salt: bytes, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        """Let the whole blocks of a sequence be found by its tokens, under the same salt."""
        for block, digest in zip(blocks, _digests(salt, tokens), strict=False):
            if digest not in self._found and block not in self._digests:
                self._found[digest] = block
                self._digests[block] = digest

    def find(self, salt: bytes, tokens: Sequence[int]) -> list[int]:
        """Hold and return the blocks with the longest beginning of these tokens."""
        blocks = []
        for digest in _digests(salt, tokens):
            if digest not in self._found:
                break
            blocks.append(self._found[digest])
        self.hold(blocks)
        return blocks

    @torch.inference_mode()
    def copy(self, source: int, target: int) -> None:
        """Copy one block over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int]) -> None:
        """Zero those that one sequence has alone and that cannot be found.

        What is masked is multiplied by 0, and NaN stays NaN.
        """
        own = [one for one in blocks if self._holders[one] == 1 and one not in self._digests]
        for tensor in (*self.keys, *self.values):
            tensor[own] = 0

    @torch.inference_mode()
    def _touch(self, count: int) -> None:
        first = self._touched
        self._touched = min(self.blocks, first + max(count, _GROWTH_BLOCKS))
        # Zeros, as what lies beyond a sequence's tokens must be finite.
        for tensor in (*self.keys, *self.values):
            tensor[first : self._touched].zero_()
        # The lowest are taken first.
        self._free[:0] = reversed(range(first, self._touched))


def _digests(salt: bytes, tokens: Sequence[int]) -> Iterator[bytes]:
    """Yield one digest a whole block: of all tokens up to its end and the salt."""
    digest = blake2b(salt, digest_size=_DIGEST_BYTES).digest()
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        held = array("I", tokens[end - BLOCK_TOKENS : end]).tobytes()
        digest = blake2b(digest + held, digest_size=_DIGEST_BYTES).digest()
        yield digest
