"""Continuous batching: requests join and leave the batch between two steps."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVarTuple

import structlog
import torch

from lowbit_server.engine.choosing import NOT_NUMBERS, Chooser
from lowbit_server.engine.engine import Status
from lowbit_server.engine.kv_cache import KvCache
from lowbit_server.engine.logprobs import token_logprobs
from lowbit_server.engine.lookup import PromptLookup
from lowbit_server.engine.pacing import Pacing
from lowbit_server.engine.request import Output
from lowbit_server.engine.residents import Residents
from lowbit_server.engine.roster import Roster
from lowbit_server.engine.scoring import Scoring
from lowbit_server.models.decoder import BLOCK_TOKENS, Batch, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lowbit_server.engine.request import Request, Running
    from lowbit_server.engine.rows import Row
    from lowbit_server.models.decoder import DecoderModel

Arguments = TypeVarTuple("Arguments")

SCORED_CHUNKS = 32
"""A score that others wait for gives its blocks up after so many chunks, finds its prompt again
when it is its turn, and goes on: a thousand continuations must not hold up a prompt."""
DETERMINISTIC_CHUNK_TOKENS = 64
"""What a deterministic prompt is read in, whoever runs beside it."""


class BatchingEngine:
    """Runs requests on a `DecoderModel`."""

    def __init__(self, model: DecoderModel, max_running: int, kv_cache_bytes: int) -> None:
        """Make an idle engine of at most `max_running` slots and `kv_cache_bytes`.

        Raises MemoryError when not even a short request fits.
        """
        self._model = model
        self._kv = KvCache(model.spec, kv_cache_bytes)
        self.context_tokens = min(model.spec.context_tokens, self._kv.blocks * BLOCK_TOKENS)
        if self.context_tokens < 1:
            message = f"a KV cache of {kv_cache_bytes} bytes does not hold one request"
            raise MemoryError(message)
        self._roster = Roster(max_running)
        self._residents = Residents(self._kv, self._roster)
        self._chooser = Chooser(model.spec, self._roster, self._residents)
        self._pacing = Pacing()
        self._log = structlog.get_logger()

    def submit(self, request: Request) -> list[Output]:
        """Queue a request; return its end when it cannot run."""
        # Checked here, since a bad index takes a whole batch down, or the CUDA context.
        given = (request.prompt, *request.continuations)
        if max(max(tokens, default=0) for tokens in given) >= self._model.spec.vocab_size:
            return [Output(request.id, error="the prompt has a token the model does not know")]
        return self._roster.submit(request, self.context_tokens)

    def cancel(self, request_id: int, index: int | None = None) -> list[Output]:
        """End one request, or one of its outputs."""
        outputs = self._roster.cancel(request_id, index)
        self._residents.drop_ended()
        return outputs

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        outputs = self._roster.cancel_all()
        self._residents.drop_ended()
        return outputs

    def step(self) -> list[Output]:
        """Decode every running output by a token or more, then read one chunk of a prompt.

        Or one chunk of a continuation that is scored.
        """
        with torch.inference_mode():
            outputs = self._roster.expire(time.monotonic())
            self._residents.drop_ended()
            outputs += self._decode()
            self._residents.drop_ended()
            outputs += self._read_on()
            self._residents.drop_ended()
        return outputs

    def status(self) -> Status:
        """Return how the engine stands; with work it is always due."""
        running, waiting = len(self._roster.running), self._roster.waiting
        due = -math.inf if running or waiting else None
        return Status(due, running, waiting, self._kv.held_bytes)

    def _decode(self) -> list[Output]:
        self._residents.make_room()
        rows = self._residents.decoding
        batches = [[row] for row in rows if row.request.deterministic]
        batches += [[row for row in rows if not row.request.deterministic]]
        outputs: list[Output] = []
        began = time.perf_counter()
        for batch in filter(None, batches):
            running = [row.running for row in batch]
            outputs += self._guarded(running, self._extend, batch)
        if rows:
            self._pacing.decoded(time.perf_counter() - began)
        return outputs

    def _extend(self, rows: Sequence[Row]) -> list[Output]:
        """Run each row's last token and what is drafted behind it."""
        drafted = [(row, self._draft(row)) for row in rows]
        # Those of one token first: they are one rectangle.
        drafts = dict(sorted(drafted, key=lambda pair: len(pair[1]) > 0))
        logits = self._forward(
            [
                Span((row.running.tokens[-1], *draft), row.length, row.blocks, 1 + len(draft))
                for row, draft in drafts.items()
            ]
        )
        for row in rows:
            row.length += 1
        return self._chooser.choose(drafts, logits)

    def _draft(self, row: Row) -> Sequence[int]:
        """Guess what may follow, as far as there is room for it."""
        running, request = row.running, row.request
        if request.deterministic or not request.prompt_lookup_tokens:
            return ()
        if running.lookup is None:
            running.lookup = PromptLookup(request.prompt)
        running.lookup.follow(running.tokens)
        room = (len(row.blocks) + self._kv.available) * BLOCK_TOKENS
        left = min(running.context_tokens, room, len(request.prompt) + request.max_tokens)
        # Of what is left the step makes one token without a draft.
        count = min(request.prompt_lookup_tokens, left - row.known - 1)
        draft = running.lookup.draft(max(count, 0))
        self._residents.grow(row, row.known + len(draft))
        return draft

    def _read_on(self) -> list[Output]:
        self._residents.admit(time.monotonic())
        row = self._residents.reading
        if row is None:
            return []
        beside_streams = len(self._residents.decoding) > 0
        if row.request.deterministic:
            size = DETERMINISTIC_CHUNK_TOKENS if row.length < len(row.request.prompt) else 1
        else:
            size = self._pacing.chunk_tokens(beside_streams=beside_streams)
        began = time.perf_counter()
        if row.scoring:
            chunk = row.scoring.left[:size]
            outputs = self._guarded(row.outputs, self._score, row, row.scoring, chunk)
        else:
            chunk = row.next_tokens(size)
            outputs = self._guarded(row.outputs, self._read, row, chunk)
        if beside_streams and not row.request.deterministic:
            self._pacing.read(len(chunk), time.perf_counter() - began)
        return outputs

    def _read(self, row: Row, chunk: Sequence[int]) -> list[Output]:
        """Read one chunk of a prompt; with the last one its outputs begin to decode."""
        last = row.length + len(chunk) == row.known
        tells = row.request.prompt_logprobs and not row.running.prompt_told
        wanted = len(chunk) if tells else int(last)
        logits = self._forward([Span(chunk, row.length, row.blocks, wanted)])
        row.length += len(chunk)
        outputs = [_prompt_logprobs(row, logits)] if tells else []
        if not last:
            return outputs
        self._check(row, logits[-1])
        if row.request.continuations:
            running = row.running
            running.scoring = running.scoring or Scoring(row.request, logits[-1].float())
            row.scoring = running.scoring
            return self._scores(row, row.scoring)
        for running in row.outputs:
            running.prompt_told = True
        rows = self._residents.begin()
        drafts = dict.fromkeys(rows, ())
        return outputs + self._chooser.choose(drafts, logits[-1:].repeat(len(rows), 1))

    def _score(self, row: Row, scoring: Scoring, chunk: Sequence[int]) -> list[Output]:
        """Run one chunk of a continuation behind the prompt."""
        row.length = len(row.request.prompt) + scoring.position
        logits = self._forward([Span(chunk, row.length, row.blocks, len(chunk))])
        self._check(row, logits)
        scoring.take(logits)
        row.scored_chunks += 1
        return self._scores(row, scoring)

    def _scores(self, row: Row, scoring: Scoring) -> list[Output]:
        outputs = scoring.scores()
        if outputs and not outputs[0].index:
            outputs[0] = replace(outputs[0], cached_tokens=row.running.cached_tokens)
        if scoring.done:
            outputs[-1] = self._roster.finish(row.running, outputs[-1])
        elif self._roster.waiting and outputs and row.scored_chunks >= SCORED_CHUNKS:
            self._roster.requeue(row.running)
        return outputs

    def _forward(self, spans: Sequence[Span]) -> Tensor:
        return self._model.forward(Batch(spans, self._kv.keys, self._kv.values))

    def _guarded(
        self,
        outputs: Sequence[Running],
        work: Callable[[*Arguments], list[Output]],
        *arguments: *Arguments,
    ) -> list[Output]:
        """Do some work; its failure ends these outputs, the others never notice."""
        try:
            return work(*arguments)
        except Exception as error:  # noqa: BLE001  (whatever it is, the loop goes on)
            self._log.exception("a step failed", requests=len(outputs))
            message = f"{type(error).__name__} in the engine: {error}"[:200]
            return [self._roster.fail(running, message) for running in outputs]

    def _check(self, row: Row, logits: Tensor) -> None:
        """Wipe a row and raise when its logits are not numbers."""
        if logits.amax(-1).isnan().any():
            self._residents.wipe(row)
            raise ArithmeticError(NOT_NUMBERS)


def _prompt_logprobs(row: Row, logits: Tensor) -> Output:
    """Return what logits (tokens, vocabulary), those of the last chunk, say of the prompt."""
    request, count = row.request, len(logits)
    following = request.prompt[row.length - count + 1 : row.length + 1]
    top = [request.logprobs or 0] * len(following)
    found = token_logprobs(logits[: len(following)], following, top)
    return Output(request.id, prompt_logprobs=tuple(found))
