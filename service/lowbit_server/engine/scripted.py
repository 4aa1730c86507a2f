"""An engine that plays a script: tokens, delays and faults for tests and benchmarks."""

from __future__ import annotations

import math
import os
import threading
import time
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowbit_server.engine.engine import Status
from lowbit_server.engine.request import Output, TokenLogprob
from lowbit_server.engine.roster import Roster

if TYPE_CHECKING:
    from lowbit_server.engine.request import Request, Running


class Fault(BaseModel):
    """Something that goes wrong once a request has `after_tokens` tokens.

    error fails the request, exit ends the process, hang blocks the step loop for good,
    load_error fails the load.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["error", "exit", "hang", "load_error"]
    after_tokens: int = Field(default=0, ge=0)
    if_prompt_has: int | None = None

    def hits(self, running: Running) -> bool:
        """Whether it is this request's turn."""
        return len(running.tokens) == self.after_tokens and (
            self.if_prompt_has is None or self.if_prompt_has in running.request.prompt
        )


class Script(BaseModel):
    """What the engine plays. Without `tokens` it repeats the prompt.

    The output with index i begins at the script's token i. The distribution: the next token
    of the script has probability 1/2, the token id after it 1/4, and so on, around the
    vocabulary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step_ms: float = Field(default=5.0, ge=0)
    prefill_ms: float = Field(default=0.0, ge=0)
    load_ms: float = Field(default=0.0, ge=0)
    tokens: tuple[int, ...] = ()
    max_running: int = Field(default=64, ge=1)
    faults: tuple[Fault, ...] = ()


class ScriptedConfig(BaseModel):
    """The `config.json` of a scripted artefact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["lowbit_scripted"]
    architectures: tuple[Literal["ScriptedModel"]]
    max_position_embeddings: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    script: Script = Script()


class ScriptedEngine:
    """Plays a script for each request.

    As prompts interrupt the steps of a `BatchingEngine`, a first token comes as soon as its
    prefill is over; all further ones come on one clock.
    """

    def __init__(self, config: ScriptedConfig, max_running: int) -> None:
        """Make an engine of at most `max_running` slots; the script may want fewer."""
        self._script = config.script
        self._vocab_size = config.vocab_size
        self.context_tokens = config.max_position_embeddings
        self._roster = Roster(min(max_running, config.script.max_running))
        self._due = 0.0

    def submit(self, request: Request) -> list[Output]:
        """Queue a request; the first one after an idle time starts the clock anew."""
        now = time.monotonic()
        if self.status().due is None:
            self._due = now
        outputs = self._roster.submit(request, self.context_tokens)
        self._admit(now)
        return outputs

    def cancel(self, request_id: int, index: int | None = None) -> list[Output]:
        """End one request, or one of its outputs."""
        outputs = self._roster.cancel(request_id, index)
        self._admit(time.monotonic())
        return outputs

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        return self._roster.cancel_all()

    def step(self) -> list[Output]:
        """Give each request whose time it is the next token of the script."""
        now = time.monotonic()
        is_step = now >= self._due
        if is_step:
            # From deadline to deadline, not from now: lateness must not add up.
            self._due += self._script.step_ms / 1e3
        outputs = self._roster.expire(now)
        self._admit(now)
        for running in tuple(self._roster.running):
            if is_step if running.tokens else now >= self._first_at(running):
                outputs += self._play(running, now)
        self._admit(now)
        return outputs

    def status(self) -> Status:
        """Return how the engine stands; it has no KV cache."""
        running, waiting = self._roster.running, self._roster.waiting
        firsts = [self._first_at(one) for one in running if not one.tokens]
        due = min([self._due, *firsts]) if running or waiting else None
        return Status(due, len(running), waiting, 0)

    def _admit(self, now: float) -> None:
        while self._roster.admit(now, lambda _: True):
            pass

    def _first_at(self, running: Running) -> float:
        """Return when the prompt of a request has been read."""
        return running.slot_at + self._script.prefill_ms / 1e3

    def _play(self, running: Running, now: float) -> list[Output]:
        for fault in self._script.faults:
            if fault.kind != "load_error" and fault.hits(running):
                if fault.kind == "error":
                    return [self._roster.fail(running, "scripted error")]
                if fault.kind == "exit":
                    os._exit(1)
                threading.Event().wait()
        request = running.request
        if request.continuations:
            scores = [self._score(request, index) for index in range(len(request.continuations))]
            return [*scores[:-1], self._roster.finish(running, scores[-1])]
        top = request.logprobs
        outputs = []
        if request.prompt_logprobs and not running.tokens and not running.index:
            outputs.append(Output(request.id, prompt_logprobs=self._prompt(request)))
        token = self._scripted(request, running.index + len(running.tokens))
        logprob = None if top is None else self._logprob(token, token, top)
        return [*outputs, self._roster.extend(running, token, now, logprob)]

    def _prompt(self, request: Request) -> tuple[TokenLogprob, ...]:
        """Return what the script says of the prompt, as if that were its output."""
        return tuple(
            self._logprob(token, self._scripted(request, position), request.logprobs or 0)
            for position, token in enumerate(request.prompt)
            if position
        )

    def _scripted(self, request: Request, position: int) -> int:
        tokens = self._script.tokens or request.prompt
        return tokens[position % len(tokens)]

    def _score(self, request: Request, index: int) -> Output:
        tokens = request.continuations[index]
        script = [self._scripted(request, position) for position in range(len(tokens))]
        logprobs = tuple(map(self._logprob, tokens, script))
        greedy = list(tokens) == script
        return Output(request.id, index=index, logprobs=logprobs, greedy=greedy)

    def _logprob(self, token: int, scripted: int, top: int = 0) -> TokenLogprob:
        """Return what the script's distribution says of a token."""
        size = self._vocab_size
        ranks = range(min(top, size))
        return TokenLogprob(
            -math.log(2) * (1 + (token - scripted) % size),
            tuple((scripted + rank) % size for rank in ranks),
            tuple(-math.log(2) * (1 + rank) for rank in ranks),
        )
