"""What an engine is asked for and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class Finish(IntEnum):
    """Why an output ended; the numbers of `lowbit.v1.FinishReason`."""

    EOS = 1
    STOP = 2
    MAX_TOKENS = 3
    CONTEXT_LIMIT = 4
    TIME_LIMIT = 5
    CANCELLED = 6


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen; the defaults are greedy without penalties."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on tokens seen before."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One request; times are seconds of the monotonic clock."""

    id: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    submitted_at: float = 0.0
    ends_by: float = float("inf")


@dataclass(slots=True, eq=False)
class Running:
    """A request and what was made for it so far."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    slot_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """What one step made for one request: tokens, its end, or both.

    `queue_us` comes with the first token; an `error` is an end without a reason.
    """

    request: int
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    queue_us: int = 0
    error: str = ""
