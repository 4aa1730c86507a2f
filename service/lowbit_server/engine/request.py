"""What an engine is asked for and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.engine.lookup import PromptLookup
    from lowbit_server.engine.sampler import RowSampler
    from lowbit_server.engine.scoring import Scoring
    from lowbit_server.grammar.matcher import Matcher


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
    typical_p: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

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
    """One request; times are seconds of the monotonic clock.

    `logprobs` asks for the log-probabilities of each token and of so many likeliest ones,
    `prompt_logprobs` for those of the prompt, from its second token on, too.
    `n` outputs are made of one prompt. With `continuations`, none of them empty, these are
    scored and nothing is generated; `max_tokens` is then the length of the longest.
    A `deterministic` one is computed by itself; up to `prompt_lookup_tokens` a step are drafted;
    beginnings of prompts are shared between requests of one `cache_salt` only.
    """

    id: int
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    submitted_at: float = 0.0
    ends_by: float = float("inf")
    logprobs: int | None = None
    prompt_logprobs: bool = False
    n: int = 1
    continuations: tuple[tuple[int, ...], ...] = ()
    deterministic: bool = False
    prompt_lookup_tokens: int = 0
    cache_salt: bytes = b""
    matcher: Matcher | None = None
    """Says what may come first; each output follows a copy of it."""


@dataclass(slots=True, eq=False)
class Running:
    """One output of a request: what was made for it so far.

    `context_tokens` is the most that it may have with its prompt.
    """

    request: Request
    index: int
    context_tokens: int
    tokens: list[int] = field(default_factory=list)
    slot_at: float = 0.0
    cached_tokens: int = 0
    """Tokens of the prompt that were found in the KV cache."""
    prompt_told: bool = False
    """Whether the prompt's log-probabilities, if asked for, were all said."""
    scoring: Scoring | None = None
    """What is known of its continuations, once the prompt was read."""
    sampler: RowSampler | None = None
    """Made with its first token."""
    lookup: PromptLookup | None = None
    """Made with its first draft."""
    complete: bool = False
    """Whether it is all that its constraint allows, and said so by an end token."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of a token, and the likeliest ones at its position."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What one step made for one output: tokens, a score, its end, or some of these.

    Or the next log-probabilities of the prompt, before the first token.

    `index` says which of the request's outputs, or which continuation has this score.
    `queue_us` and `cached_tokens`, tokens of the prompt that were found in the KV cache, come
    with the first token, the latter with the first score too. An `error` is an end of the whole
    request without a reason, and the request's own fault where it is `refused`. A score has a
    log-probability for each token and says whether these are the `greedy` choices.
    """

    request: int
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    queue_us: int = 0
    error: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0
    greedy: bool = False
    cached_tokens: int = 0
    refused: bool = False
