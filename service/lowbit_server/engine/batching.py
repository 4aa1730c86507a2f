"""Continuous batching: requests join and leave the batch between two steps."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import structlog
import torch

from lowbit_server.engine.engine import Status
from lowbit_server.engine.kv_cache import KvCache
from lowbit_server.engine.logprobs import AskedLogprobs, token_logprobs
from lowbit_server.engine.pacing import Pacing
from lowbit_server.engine.request import Output
from lowbit_server.engine.roster import Roster
from lowbit_server.engine.rows import Prefill, Row
from lowbit_server.engine.sampler import RowSampler, sample
from lowbit_server.engine.scoring import Scoring
from lowbit_server.models.decoder import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lowbit_server.engine.request import Request, Running
    from lowbit_server.models.decoder import DecoderModel


SCORED_CHUNKS = 32
"""A score that others wait for gives its row up after so many chunks, reads its prompt again
when it is its turn, and goes on: a thousand continuations must not hold up a prompt."""


class BatchingEngine:
    """Runs requests on a `DecoderModel`.

    Rows of the KV cache are filled from 0 without holes: first those of outputs that decode,
    then at most one whose prompt is being read, or continued for scores. So every batch is a
    slice.
    """

    def __init__(self, model: DecoderModel, max_running: int, kv_cache_bytes: int) -> None:
        """Make an idle engine of at most `max_running` slots and `kv_cache_bytes`.

        Raises MemoryError when not even a short request fits.
        """
        self._model = model
        self._kv = KvCache(model.spec, kv_cache_bytes)
        self.context_tokens = self._context_tokens(1)
        if self.context_tokens < 1:
            message = f"a KV cache of {kv_cache_bytes} bytes does not hold one request"
            raise MemoryError(message)
        self._roster = Roster(max_running)
        self._decoding: list[Row] = []
        self._prefilling: Prefill | None = None
        self._pacing = Pacing()
        self._log = structlog.get_logger()

    def submit(self, request: Request) -> list[Output]:
        """Queue a request; return its end when it cannot run."""
        # Checked here, since a bad index takes a whole batch down, or the CUDA context.
        given = (request.prompt, *request.continuations)
        if max(max(tokens, default=0) for tokens in given) >= self._model.spec.vocab_size:
            return [Output(request.id, error="the prompt has a token the model does not know")]
        return self._roster.submit(request, self._context_tokens(request.n))

    def cancel(self, request_id: int, index: int | None = None) -> list[Output]:
        """End one request, or one of its outputs."""
        outputs = self._roster.cancel(request_id, index)
        self._close_holes()
        return outputs

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        outputs = self._roster.cancel_all()
        self._close_holes()
        return outputs

    def step(self) -> list[Output]:
        """Decode one token of every running output, then read one chunk of a prompt.

        Or one chunk of a continuation that is scored.
        """
        with torch.inference_mode():
            outputs = self._roster.expire(time.monotonic())
            self._close_holes()
            outputs += self._decode()
            self._close_holes()
            outputs += self._prefill()
            self._close_holes()
        return outputs

    def status(self) -> Status:
        """Return how the engine stands; with work it is always due."""
        running, waiting = len(self._roster.running), self._roster.waiting
        due = -math.inf if running or waiting else None
        return Status(due, running, waiting, self._kv.bytes)

    def _decode(self) -> list[Output]:
        rows = self._decoding
        if not rows:
            return []
        tokens = [row.running.tokens[-1:] for row in rows]
        began = time.perf_counter()
        outputs = self._guarded(
            [row.running for row in rows],
            lambda: self._choose(rows, self._model.forward(self._batch(rows, tokens, 0)), 0),
        )
        self._pacing.decoded(time.perf_counter() - began)
        return outputs

    def _prefill(self) -> list[Output]:
        if self._prefilling is None:
            admitted = self._roster.admit(time.monotonic(), self._fits)
            if not admitted:
                return []
            self._prefilling = Prefill(admitted)
        prefill = self._prefilling
        scoring, beside_streams = prefill.scoring, len(self._decoding) > 0
        work, left = (self._score, scoring.left) if scoring else (self._read, prefill.prompt_left)
        chunk = left[: self._pacing.chunk_tokens(beside_streams=beside_streams)]
        began = time.perf_counter()
        outputs = self._guarded(prefill.outputs, lambda: work(prefill, chunk))
        if beside_streams:
            self._pacing.read(len(chunk), time.perf_counter() - began)
        return outputs

    def _read(self, prefill: Prefill, chunk: Sequence[int]) -> list[Output]:
        """Read one chunk of a prompt; with the last one its outputs begin to decode."""
        index = len(self._decoding)
        batch = self._batch([prefill], [chunk], index)
        outputs: list[Output] = []
        if prefill.request.prompt_logprobs:
            every = self._model.logits(batch)[0]
            logits = every[-1:].float()
            outputs = [_prompt_logprobs(prefill, every)]
        else:
            logits = self._model.forward(batch)
        if prefill.prompt_left:
            return outputs
        if prefill.request.continuations:
            self._check(logits, index)
            running = prefill.outputs[0]
            prefill.scoring = running.scoring = running.scoring or Scoring(
                prefill.request, logits[0]
            )
            return self._scores(prefill, prefill.scoring)
        return outputs + self._begin(prefill, logits)

    def _begin(self, prefill: Prefill, logits: Tensor) -> list[Output]:
        """Give each output a row with the prompt and its first token."""
        spec, first_row = self._model.spec, len(self._decoding)
        rows = [
            Row(running, RowSampler(running, spec.vocab_size, spec.device), prefill.length)
            for running in prefill.outputs
        ]
        self._reserve(first_row + len(rows), prefill.length)
        for row in range(first_row + 1, first_row + len(rows)):
            self._kv.copy(first_row, row, prefill.length)
        self._decoding += rows
        self._prefilling = None
        return self._choose(rows, logits.repeat(len(rows), 1), first_row)

    def _score(self, prefill: Prefill, chunk: Sequence[int]) -> list[Output]:
        """Run one chunk of a continuation behind the prompt."""
        index, scoring = len(self._decoding), prefill.scoring
        assert scoring is not None  # noqa: S101
        prefill.length = len(prefill.request.prompt) + scoring.position
        logits = self._model.logits(self._batch([prefill], [chunk], index))[0]
        self._check(logits, index)
        scoring.take(logits)
        prefill.scored_chunks += 1
        return self._scores(prefill, scoring)

    def _scores(self, prefill: Prefill, scoring: Scoring) -> list[Output]:
        outputs = scoring.scores()
        if scoring.done:
            self._prefilling = None
            outputs[-1] = self._roster.finish(prefill.outputs[0], outputs[-1])
        elif self._roster.waiting and outputs and prefill.scored_chunks >= SCORED_CHUNKS:
            self._prefilling = None
            self._roster.requeue(prefill.outputs[0])
        return outputs

    def _batch(
        self, rows: Sequence[Row | Prefill], tokens: Sequence[Sequence[int]], first_row: int
    ) -> Batch:
        """Make room for tokens behind those that the rows have."""
        starts = [row.length for row in rows]
        for row in rows:
            row.length += len(tokens[0])
        self._reserve(first_row + len(rows), max(starts) + len(tokens[0]))
        return Batch(tokens, starts, *self._kv.view(first_row, len(rows)))

    def _reserve(self, rows: int, length: int) -> None:
        live = [self._most_tokens(running) for running in self._roster.running]
        self._kv.reserve(rows, length, live)

    def _guarded(
        self, outputs: Sequence[Running], work: Callable[[], list[Output]]
    ) -> list[Output]:
        """Do some work; its failure ends these outputs, the others never notice."""
        try:
            return work()
        except Exception as error:  # noqa: BLE001  (whatever it is, the loop goes on)
            self._log.exception("a step failed", requests=len(outputs))
            message = f"{type(error).__name__} in the engine: {error}"[:200]
            return [self._roster.fail(running, message) for running in outputs]

    def _check(self, logits: Tensor, row: int) -> None:
        """Wipe what a row stored and raise when its logits are not numbers."""
        if logits.amax(-1).isnan().any():
            self._kv.clear(row)
            message = "the model's logits are not numbers"
            raise ArithmeticError(message)

    def _choose(self, rows: Sequence[Row], logits: Tensor, first_row: int) -> list[Output]:
        """Sample; rows whose logits are not numbers fail, and what they stored is wiped."""
        broken = logits.amax(-1).isnan().tolist()
        if any(broken):
            for index in (index for index, bad in enumerate(broken) if bad):
                self._kv.clear(first_row + index)
            # They are sampled with the rest, from anything that can be sampled.
            logits = logits.nan_to_num()
        asked = AskedLogprobs(logits, [row.running.request.logprobs for row in rows])
        chosen = sample(logits, [row.sampler for row in rows])
        logprobs = asked.of(chosen)
        now = time.monotonic()
        return [
            self._roster.fail(row.running, "the model's logits are not numbers")
            if bad
            else self._roster.extend(row.running, token, now, logprob)
            for row, token, logprob, bad in zip(rows, chosen, logprobs, broken, strict=True)
        ]

    def _fits(self, group: list[Running]) -> bool:
        """Whether outputs fit beside those that run, however long they all get."""
        return self._kv.fits(map(self._most_tokens, [*self._roster.running, *group]))

    def _context_tokens(self, outputs: int) -> int:
        """Return how long each of a request's outputs may get with the prompt."""
        return min(self._model.spec.context_tokens, self._kv.row_limit_tokens(outputs))

    def _most_tokens(self, running: Running) -> int:
        request = running.request
        return min(len(request.prompt) + request.max_tokens, running.context_tokens)

    def _close_holes(self) -> None:
        """Move the last rows into the places of outputs that have ended."""
        live = set(self._roster.running)
        prefill_row = len(self._decoding)
        for hole in range(len(self._decoding) - 1, -1, -1):
            if self._decoding[hole].running not in live:
                last = self._decoding.pop()
                if hole < len(self._decoding):
                    self._kv.copy(len(self._decoding), hole, last.length)
                    self._decoding[hole] = last
        if (prefill := self._prefilling) is not None:
            prefill.outputs = [running for running in prefill.outputs if running in live]
            if not prefill.outputs:
                self._prefilling = None
            elif prefill_row != len(self._decoding):
                self._kv.copy(prefill_row, len(self._decoding), prefill.length)
        if not live:
            self._kv.release()


def _prompt_logprobs(prefill: Prefill, logits: Tensor) -> Output:
    """Return what logits (tokens, vocabulary), those of the last chunk, say of the prompt."""
    request, count = prefill.request, len(logits)
    following = request.prompt[prefill.length - count + 1 : prefill.length + 1]
    top = [request.logprobs or 0] * len(following)
    found = token_logprobs(logits[: len(following)], following, top)
    return Output(request.id, prompt_logprobs=tuple(found))
