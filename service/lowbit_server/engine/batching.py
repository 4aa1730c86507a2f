"""Continuous batching: requests join and leave the batch between two steps."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, TypeVarTuple

import structlog
import torch

from lowbit_server.engine.choosing import NOT_NUMBERS, Chooser
from lowbit_server.engine.engine import Status
from lowbit_server.engine.kv_cache import KvCache
from lowbit_server.engine.logprobs import token_logprobs
from lowbit_server.engine.lookup import draft
from lowbit_server.engine.pacing import Pacing
from lowbit_server.engine.reading import is_alone, is_whole, next_chunks, span_of, wanted_of
from lowbit_server.engine.request import Output
from lowbit_server.engine.residents import Residents
from lowbit_server.engine.roster import Roster
from lowbit_server.engine.scoring import Scoring
from lowbit_server.models.decoder import BLOCK_TOKENS, Batch, InterruptedPassError, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from ctypes import c_int

    from torch import Tensor

    from lowbit_server.engine.reading import Chunk
    from lowbit_server.engine.request import Request, Running
    from lowbit_server.engine.rows import Row
    from lowbit_server.models.decoder import DecoderModel

Arguments = TypeVarTuple("Arguments")

SCORED_CHUNKS = 32
"""A score that others wait for gives its blocks up after so many chunks, finds its prompt again
when it is its turn, and goes on: a thousand continuations must not hold up a prompt."""


class BatchingEngine:
    """Runs requests on a `DecoderModel`."""

    def __init__(
        self,
        model: DecoderModel,
        max_running: int,
        kv_cache_bytes: int,
        interrupt: c_int | None = None,
    ) -> None:
        """Make an idle engine of at most `max_running` slots and `kv_cache_bytes`.

        Another thread makes `interrupt` other than 0 when a request comes during a step, who
        calls `step` makes it 0. Raises MemoryError when not even a short request fits.
        """
        self._model = model
        self._interrupt = interrupt
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
        """Read short prompts by themselves, or decode every running output and read a chunk.

        Prompts wait for no stream so, but only between two tokens of all streams; a pass of
        these ends without effect when a request comes before half of it is done. A chunk is
        one of a prompt, several whole prompts, or one of a continuation.
        """
        with torch.inference_mode():
            outputs = self._roster.expire(time.monotonic())
            self._residents.drop_ended()
            self._residents.make_room()
            outputs += self._first_tokens() or self._mixed() or self._apart()
            self._residents.drop_ended()
        return outputs

    def status(self) -> Status:
        """Return how the engine stands; with work it is always due."""
        running, waiting = len(self._roster.running), self._roster.waiting
        due = -math.inf if running or waiting else None
        return Status(due, running, waiting, self._kv.held_bytes)

    def _first_tokens(self) -> list[Output]:
        """Read short prompts before the streams' next tokens."""
        if not self._residents.decoding or self._pacing.tokens_first <= 0:
            return []
        chunks = next_chunks(self._residents, self._pacing.tokens_first)
        whole = [*takewhile(lambda chunk: is_whole(*chunk), chunks)]
        tokens, began = sum(len(chunk) for _, chunk in whole), time.perf_counter()
        self._pacing.read_first(tokens)
        outputs = self._read_guarded(whole)
        if not self._model.spec.mixes:
            self._pacing.read(tokens, time.perf_counter() - began)
        return outputs

    def _mixed(self) -> list[Output]:
        """Decode and read in one pass; nothing is done where that is not possible or no use."""
        rows = self._residents.decoding
        step_s = self._pacing.step_s if self._model.spec.mixes and rows else 0
        if not step_s or any(row.request.deterministic for row in rows):
            return []
        chunks = next_chunks(self._residents, self._chunk_tokens)
        if not chunks or is_alone(chunks[0][0]):
            return []
        rows, began = [*rows], time.perf_counter()
        drafts, spans = self._drafts(rows)
        count = sum(len(span.tokens) for span in spans)
        try:
            logits = self._forward([*spans, *(span_of(*chunk) for chunk in chunks)])
        except Exception:  # noqa: BLE001  (whatever it is, it comes again or not)
            self._log.exception("a mixed step is done apart", requests=len(rows) + len(chunks))
            return []
        self._pacing.streams_got_tokens()
        for row in rows:
            row.length += 1
        running = [row.running for row in rows]
        outputs = self._guarded(running, self._chooser.choose, drafts, logits[:count])
        outputs += self._read(chunks, logits[count:])
        taken_s = time.perf_counter() - began - step_s
        self._pacing.read(sum(len(chunk) for _, chunk in chunks), taken_s)
        return outputs

    def _apart(self) -> list[Output]:
        """Decode, then read."""
        outputs = self._decode()
        self._residents.drop_ended()
        return outputs + self._read_on()

    def _decode(self) -> list[Output]:
        rows = self._residents.decoding
        batches = [[row] for row in rows if row.request.deterministic]
        batches += [[row for row in rows if not row.request.deterministic]]
        outputs: list[Output] = []
        began = time.perf_counter()
        try:
            for batch in filter(None, batches):
                running = [row.running for row in batch]
                outputs += self._guarded(running, self._extend, batch)
        except InterruptedPassError:
            self._pacing.interrupted = True
            return outputs
        if rows:
            self._pacing.streams_got_tokens()
            self._pacing.step_s = time.perf_counter() - began
        return outputs

    def _extend(self, rows: Sequence[Row]) -> list[Output]:
        """Run each row's last token and what is drafted behind it."""
        drafts, spans = self._drafts(rows)
        would_read = self._roster.has_room and self._pacing.tokens_first > 0
        may_interrupt = would_read and not self._pacing.interrupted
        logits = self._forward(spans, self._interrupt if may_interrupt else None)
        for row in rows:
            row.length += 1
        return self._chooser.choose(drafts, logits)

    def _drafts(self, rows: Sequence[Row]) -> tuple[dict[Row, Sequence[int]], list[Span]]:
        """Return what is drafted for each row, and what is run for it."""
        drafted = [(row, draft(row, self._residents)) for row in rows]
        # Those of one token first: they are one rectangle.
        drafts = dict(sorted(drafted, key=lambda pair: len(pair[1]) > 0))
        spans = [
            Span((row.running.tokens[-1], *guess), row.length, row.blocks, 1 + len(guess))
            for row, guess in drafts.items()
        ]
        return drafts, spans

    @property
    def _chunk_tokens(self) -> int:
        return self._pacing.chunk_tokens(beside_streams=len(self._residents.decoding) > 0)

    def _read_on(self) -> list[Output]:
        chunks = next_chunks(self._residents, self._chunk_tokens)
        if not chunks:
            return []
        beside_streams = len(self._residents.decoding) > 0
        began = time.perf_counter()
        (row, chunk), *others = chunks
        if row.scoring:
            outputs = self._guarded(row.outputs, self._score, row, row.scoring, chunk)
        else:
            outputs = self._read_guarded(chunks)
        # Where passes are mixed, one apart from the streams says nothing of the others.
        paced = beside_streams and not self._model.spec.mixes
        if paced and (others or not row.request.deterministic):
            count = sum(len(chunk) for _, chunk in chunks)
            self._pacing.read(count, time.perf_counter() - began)
        return outputs

    def _read_guarded(self, chunks: Sequence[Chunk]) -> list[Output]:
        """Read chunks together, or one by one where that fails: it may be one row's fault."""
        if len(chunks) > 1:
            try:
                return self._read_together(chunks)
            except Exception:  # noqa: BLE001  (whatever it is, it comes again or not)
                self._log.exception("prompts are read one by one", requests=len(chunks))
        outputs = []
        for row, chunk in chunks:
            outputs += self._guarded(row.outputs, self._read_together, [(row, chunk)])
        return outputs

    def _read_together(self, chunks: Sequence[Chunk]) -> list[Output]:
        return self._read(chunks, self._forward([span_of(*chunk) for chunk in chunks]))

    def _read(self, chunks: Sequence[Chunk], logits: Tensor) -> list[Output]:
        """Take the logits of chunks; with its last one a prompt's outputs begin to decode."""
        parts = torch.split(logits, [wanted_of(*chunk) for chunk in chunks])
        outputs = []
        for (row, chunk), part in zip(chunks, parts, strict=True):
            row.length += len(chunk)
            if row.tells:
                outputs.append(_prompt_logprobs(row, part))
            if row.length == row.known:
                outputs += self._guarded(row.outputs, self._begin, row, part[-1])
        return outputs

    def _begin(self, row: Row, logits: Tensor) -> list[Output]:
        """Go on after a prompt whose last logits (vocabulary) are known."""
        self._check(row, logits)
        if row.request.continuations:
            running = row.running
            running.scoring = running.scoring or Scoring(row.request, logits.float())
            row.scoring = running.scoring
            return self._scores(row, row.scoring)
        for running in row.outputs:
            running.prompt_told = True
        rows = self._residents.begin(row)
        drafts = dict.fromkeys(rows, ())
        return self._chooser.choose(drafts, logits.repeat(len(rows), 1))

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
        elif outputs and row.scored_chunks >= SCORED_CHUNKS and self._others_wait():
            self._roster.requeue(row.running)
        return outputs

    def _others_wait(self) -> bool:
        return self._roster.waiting > 0 or len(self._residents.reading) > 1

    def _forward(self, spans: Sequence[Span], interrupt: c_int | None = None) -> Tensor:
        return self._model.forward(Batch(spans, self._kv.keys, self._kv.values, interrupt))

    def _guarded(
        self,
        outputs: Sequence[Running],
        work: Callable[[*Arguments], list[Output]],
        *arguments: *Arguments,
    ) -> list[Output]:
        """Do some work; its failure ends these outputs, the others never notice."""
        try:
            return work(*arguments)
        except InterruptedPassError:
            raise
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
