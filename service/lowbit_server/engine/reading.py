"""What a step reads of prompts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeAlias

from lowbit_server.engine.pacing import LEAST_TOKENS
from lowbit_server.models.decoder import Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.engine.residents import Residents
    from lowbit_server.engine.rows import Row

    Chunk: TypeAlias = tuple[Row, Sequence[int]]

DETERMINISTIC_CHUNK_TOKENS = 64
"""What a deterministic prompt is read in, whoever runs beside it."""


def next_chunks(residents: Residents, tokens: int) -> list[Chunk]:
    """Return what is read next: of one row, or of as many prompts as `tokens` have room for."""
    left = tokens
    chunks: list[Chunk] = []
    for row in residents.to_read(time.monotonic()):
        if is_alone(row):
            return chunks or [(row, _chunk_alone(row, left))]
        chunk = row.next_tokens(left)
        chunks.append((row, chunk))
        left -= len(chunk)
        if left < LEAST_TOKENS:
            break
    return chunks


def is_alone(row: Row) -> bool:
    """Return whether a row is read in passes of its own."""
    return row.scoring is not None or row.request.deterministic or row.tells


def is_whole(row: Row, chunk: Sequence[int]) -> bool:
    """Return whether a chunk is a prompt, but for what was cached, that may be read with others."""
    return not is_alone(row) and row.running.cached_tokens + len(chunk) == row.known


def span_of(row: Row, chunk: Sequence[int]) -> Span:
    """Return the pass over a chunk of a prompt."""
    return Span(chunk, row.length, row.blocks, wanted_of(row, chunk))


def wanted_of(row: Row, chunk: Sequence[int]) -> int:
    """Return how many logits of a chunk are wanted: all, those after the last token, or none."""
    return len(chunk) if row.tells else int(row.length + len(chunk) == row.known)


def _chunk_alone(row: Row, size: int) -> Sequence[int]:
    if row.request.deterministic:
        size = DETERMINISTIC_CHUNK_TOKENS if row.length < len(row.request.prompt) else 1
    return row.scoring.left[:size] if row.scoring else row.next_tokens(size)
