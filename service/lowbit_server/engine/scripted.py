"""An engine that plays a script: tokens, delays and faults for tests and benchmarks."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowbit_server.engine.engine import Status
from lowbit_server.engine.roster import Roster

if TYPE_CHECKING:
    from lowbit_server.engine.request import Output, Request, Running


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
    """What the engine plays. Without `tokens` it repeats the prompt."""

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
    """Plays a script for each request, all of them on one clock."""

    def __init__(self, config: ScriptedConfig, max_running: int) -> None:
        """Make an engine of at most `max_running` slots; the script may want fewer."""
        self._script = config.script
        self.context_tokens = config.max_position_embeddings
        self._roster = Roster(min(max_running, config.script.max_running), self.context_tokens)
        self._due = 0.0

    def submit(self, request: Request) -> list[Output]:
        """Queue a request; the first one after an idle time starts the clock anew."""
        if self.status().due is None:
            self._due = time.monotonic()
        return self._roster.submit(request)

    def cancel(self, request_id: int) -> list[Output]:
        """End one request."""
        return self._roster.cancel(request_id)

    def cancel_all(self) -> list[Output]:
        """End all requests."""
        return self._roster.cancel_all()

    def step(self) -> list[Output]:
        """Give each request that is past its prefill the next token of the script."""
        now = time.monotonic()
        # From deadline to deadline, not from now: lateness must not add up.
        self._due += self._script.step_ms / 1e3
        outputs = self._roster.expire(now)
        while self._roster.admit(now, lambda _: True):
            pass
        for running in tuple(self._roster.running):
            if now >= running.slot_at + self._script.prefill_ms / 1e3:
                outputs.append(self._play(running, now))
        return outputs

    def status(self) -> Status:
        """Return how the engine stands; it has no KV cache."""
        running, waiting = len(self._roster.running), self._roster.waiting
        return Status(self._due if running or waiting else None, running, waiting, 0)

    def _play(self, running: Running, now: float) -> Output:
        for fault in self._script.faults:
            if fault.kind != "load_error" and fault.hits(running):
                if fault.kind == "error":
                    return self._roster.fail(running, "scripted error")
                if fault.kind == "exit":
                    os._exit(1)
                threading.Event().wait()
        tokens = self._script.tokens or running.request.prompt
        return self._roster.extend(running, tokens[len(running.tokens) % len(tokens)], now)
