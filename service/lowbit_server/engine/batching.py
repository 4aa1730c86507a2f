"""Continuous batching: requests join and leave the batch between two steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import torch

from lowbit_server.engine.engine import Status
from lowbit_server.engine.kv_cache import KvCache
from lowbit_server.engine.request import Output
from lowbit_server.engine.roster import Roster
from lowbit_server.engine.sampler import RowSampler, sample
from lowbit_server.models.decoder import CHUNK_TOKENS, Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.engine.request import Request, Running
    from lowbit_server.models.decoder import DecoderModel


@dataclass(slots=True, eq=False)
class Row:
    """A request with a place in the KV cache, which holds its first `length` tokens."""

    running: Running
    sampler: RowSampler
    length: int = 0

    @property
    def prompt_left(self) -> Sequence[int]:
        """Tokens of the prompt that are not in the cache yet."""
        return self.running.request.prompt[self.length :]


class BatchingEngine:
    """Runs requests on a `DecoderModel`.

    Rows of the KV cache are filled from 0 without holes: first the requests that decode,
    then at most one whose prompt is being read. So every batch is a slice.
    """

    def __init__(self, model: DecoderModel, max_running: int, kv_cache_bytes: int) -> None:
        """Make an idle engine of at most `max_running` slots and `kv_cache_bytes`.

        Raises MemoryError when not even a short request fits.
        """
        self._model = model
        self._kv = KvCache(model.spec, kv_cache_bytes)
        self.context_tokens = min(model.spec.context_tokens, self._kv.row_limit_tokens)
        if self.context_tokens < 1:
            message = f"a KV cache of {kv_cache_bytes} bytes does not hold one request"
            raise MemoryError(message)
        self._roster = Roster(max_running, self.context_tokens)
        self._decoding: list[Row] = []
        self._prefilling: Row | None = None
        self._log = structlog.get_logger()

    def submit(self, request: Request) -> list[Output]:
        """Queue a request; return its end when it cannot run."""
        # Checked here, since a bad index takes a whole batch down, or the CUDA context.
        if max(request.prompt, default=0) >= self._model.spec.vocab_size:
            return [Output(request.id, error="the prompt has a token the model does not know")]
        return self._roster.submit(request)

    def cancel(self, request_id: int) -> list[Output]:
        """End one request."""
        outputs = self._roster.cancel(request_id)
        self._close_holes()
        return outputs

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        outputs = self._roster.cancel_all()
        self._close_holes()
        return outputs

    def step(self) -> list[Output]:
        """Decode one token of every running request, then read one chunk of a prompt."""
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
        return self._advance(rows, [row.running.tokens[-1:] for row in rows], 0)

    def _prefill(self) -> list[Output]:
        if self._prefilling is None:
            running = self._roster.admit(time.monotonic(), self._fits)
            if running is None:
                return []
            spec = self._model.spec
            self._prefilling = Row(running, RowSampler(running, spec.vocab_size, spec.device))
        row = self._prefilling
        outputs = self._advance([row], [row.prompt_left[:CHUNK_TOKENS]], len(self._decoding))
        if not row.prompt_left:
            self._decoding.append(row)
            self._prefilling = None
        return outputs

    def _advance(
        self, rows: Sequence[Row], tokens: Sequence[Sequence[int]], first_row: int
    ) -> list[Output]:
        """Run these rows' tokens through the model and choose the next one of each.

        A failure ends the requests of these rows; the others never notice.
        """
        starts = [row.length for row in rows]
        width = len(tokens[0])
        try:
            live = [self._most_tokens(running) for running in self._roster.running]
            self._kv.reserve(first_row + len(rows), max(starts) + width, live)
            batch = Batch(tokens, starts, *self._kv.view(first_row, len(rows)))
            logits = self._model.forward(batch)
            for row in rows:
                row.length += width
            if rows[0].prompt_left:
                return []
            return self._choose(rows, logits, first_row)
        except Exception as error:  # noqa: BLE001  (whatever it is, the loop goes on)
            self._log.exception("a step failed", requests=len(rows))
            message = f"{type(error).__name__} in the engine: {error}"[:200]
            return [self._roster.fail(row.running, message) for row in rows]

    def _choose(self, rows: Sequence[Row], logits: Tensor, first_row: int) -> list[Output]:
        """Sample; rows whose logits are not numbers fail, and what they stored is wiped."""
        broken = logits.amax(-1).isnan().tolist()
        if any(broken):
            for index in (index for index, bad in enumerate(broken) if bad):
                self._kv.clear(first_row + index)
            # They are sampled with the rest, from anything that can be sampled.
            logits = logits.nan_to_num()
        chosen = sample(logits, [row.sampler for row in rows])
        now = time.monotonic()
        return [
            self._roster.fail(row.running, "the model's logits are not numbers")
            if bad
            else self._roster.extend(row.running, token, now)
            for row, token, bad in zip(rows, chosen, broken, strict=True)
        ]

    def _fits(self, running: Running) -> bool:
        """Whether a request fits beside those that run, however long they all get."""
        return self._kv.fits(map(self._most_tokens, [*self._roster.running, running]))

    def _most_tokens(self, running: Running) -> int:
        request = running.request
        return min(len(request.prompt) + request.max_tokens, self.context_tokens)

    def _close_holes(self) -> None:
        """Move the last rows into the places of requests that have ended."""
        live = set(self._roster.running)
        prefill_row = len(self._decoding)
        for hole in range(len(self._decoding) - 1, -1, -1):
            if self._decoding[hole].running not in live:
                last = self._decoding.pop()
                if hole < len(self._decoding):
                    self._kv.move(len(self._decoding), hole, last.length)
                    self._decoding[hole] = last
        if (row := self._prefilling) is not None:
            if row.running not in live:
                self._prefilling = None
            elif prefill_row != len(self._decoding):
                self._kv.move(prefill_row, len(self._decoding), row.length)
        if not live:
            self._kv.release()
