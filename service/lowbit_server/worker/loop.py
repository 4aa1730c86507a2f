"""The step loop: plan, run one step, hand out what it made."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from typing import TYPE_CHECKING, NoReturn

import psutil
import structlog

from lowbit.v1.model_pb2 import LoadPhase
from lowbit.worker.v1 import worker_pb2 as pb
from lowbit_server.engine.request import Finish, Output
from lowbit_server.worker import convert
from lowbit_server.worker.inbox import (
    Attached,
    Detached,
    Item,
    LoadAdvanced,
    LoadFailed,
    LoadSucceeded,
    Prepared,
    Submission,
    Ticket,
)
from lowbit_server.worker.memory import release_memory
from lowbit_server.worker.outbox import Outbox
from lowbit_server.worker.preparing import Preparer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.engine.engine import Engine
    from lowbit_server.grammar.matcher import Vocabulary
    from lowbit_server.worker.device import Cpu, Cuda
    from lowbit_server.worker.inbox import Inbox
    from lowbit_server.worker.loader import Loader


@dataclass(frozen=True, slots=True)
class Live:
    """A model that takes requests."""

    engine: Engine
    live_bytes: int
    vocabulary: Vocabulary | None


class StepLoop:
    """Owns all models and requests of the process; runs on one thread."""

    def __init__(self, inbox: Inbox, loader: Loader, device: Cpu | Cuda) -> None:
        """Make a loop without models."""
        self._inbox = inbox
        self._loader = loader
        self._device = device
        # In the order of their last steps, the latest at the end.
        self._live: dict[str, Live] = {}
        self._loading: dict[str, Ticket] = {}
        self._preparer = Preparer(inbox)
        # Submissions whose grammars are being compiled, by the number of the request.
        self._preparing: dict[int, Submission] = {}
        # Nobody is attached yet: a closed outbox drops what it is sent.
        self._outbox = Outbox()
        self._outbox.close()
        self._process = psutil.Process()
        self._log = structlog.get_logger()

    def run(self) -> NoReturn:
        """Step engines for ever."""
        while True:
            # No name for the engine here: it would outlive its unload.
            self._hand_out(self._plan().step())

    def _plan(self) -> Engine:
        """Carry out commands until an engine is due and return it."""
        while True:
            self._inbox.interrupt.value = 0
            for _ in range(self._inbox.qsize()):
                self._obey(self._inbox.get_nowait())
            engine, wait_s = self._next()
            if engine is not None:
                return engine
            with suppress(Empty):
                self._obey(self._inbox.get(timeout=wait_s))

    def _next(self) -> tuple[Engine | None, float | None]:
        """Return the engine to step, or how long there is none, seconds; None: no work.

        Of several the one that was stepped longest ago goes first: they take turns.
        """
        now, wait_s = time.monotonic(), None
        for model, live in self._live.items():
            due = live.engine.status().due
            if due is not None and due <= now:
                self._live[model] = self._live.pop(model)
                return live.engine, 0
            if due is not None:
                wait_s = due - now if wait_s is None else min(wait_s, due - now)
        return None, wait_s

    def _hand_out(self, outputs: Sequence[Output]) -> None:
        if not outputs:
            return
        statuses = [live.engine.status() for live in self._live.values()]
        running = sum(status.running for status in statuses)
        waiting = sum(status.waiting for status in statuses)
        self._outbox.send(convert.step(outputs, running, waiting))

    def _obey(self, item: Item) -> None:  # noqa: C901  (a case for each kind of item)
        match item:
            case Submission():
                self._submit(item)
            case Prepared():
                self._submit_prepared(item)
            case pb.Cancel():
                self._cancel(item)
            case pb.Ping():
                self._outbox.send(self._pong())
            case pb.Load():
                self._load(item)
            case pb.Unload():
                self._unload(item.model)
            case pb.WarmUp():
                self._loader.warm_up()
            case LoadAdvanced() | LoadSucceeded() | LoadFailed():
                self._follow(item)
            case Attached():
                self._attach(item.outbox)
            case Detached():
                self._detach(item.outbox)

    def _submit(self, item: Submission) -> None:
        live = self._live.get(item.model)
        if live is None:
            self._hand_out([Output(item.request.id, error="the model is not live")])
        elif item.grammar is None:
            self._hand_out(live.engine.submit(item.request))
        elif live.vocabulary is None:
            error = "the outputs of a scripted model follow no grammar"
            self._hand_out([Output(item.request.id, error=error, refused=True)])
        else:
            self._preparing[item.request.id] = item
            self._preparer.start(item, live.vocabulary)

    def _submit_prepared(self, news: Prepared) -> None:
        """Pass on a request whose grammar is compiled, unless it was cancelled meanwhile."""
        submission = self._preparing.pop(news.request.id, None)
        if submission is None:
            return
        if news.error:
            self._hand_out([Output(news.request.id, error=news.error, refused=True)])
        else:
            self._submit(Submission(submission.model, news.request))

    def _cancel(self, item: pb.Cancel) -> None:
        if submission := self._preparing.pop(item.request, None):
            self._hand_out(_cancelled(submission))
        index = item.index if item.HasField("index") else None
        for live in self._live.values():
            self._hand_out(live.engine.cancel(item.request, index))

    def _load(self, item: pb.Load) -> None:
        if live := self._live.get(item.model):
            self._send_loaded(item.model, live)
        elif item.model not in self._loading:
            self._loading[item.model] = self._loader.start(item.model, item.path)

    def _follow(self, news: LoadAdvanced | LoadSucceeded | LoadFailed) -> None:
        """Pass on what the loader says, unless the load was given up meanwhile."""
        model = news.ticket.model
        if self._loading.get(model) is not news.ticket:
            return
        if isinstance(news, LoadAdvanced):
            phase, fraction = LoadPhase.ValueType(news.phase), news.fraction
            progress = pb.LoadProgress(model=model, phase=phase, fraction=fraction)
            self._outbox.send(pb.AttachResponse(load_progress=progress))
            return
        del self._loading[model]
        if isinstance(news, LoadFailed):
            failed = pb.LoadFailed(
                model=model, message=news.message, out_of_memory=news.out_of_memory
            )
            self._outbox.send(pb.AttachResponse(load_failed=failed))
            return
        self._live[model] = Live(news.engine, news.live_bytes, news.vocabulary)
        self._log.info("loaded", model=model, live_bytes=news.live_bytes)
        self._send_loaded(model, self._live[model])

    def _send_loaded(self, model: str, live: Live) -> None:
        loaded = pb.Loaded(
            model=model, live_bytes=live.live_bytes, context_tokens=live.engine.context_tokens
        )
        self._outbox.send(pb.AttachResponse(loaded=loaded))

    def _unload(self, model: str) -> None:
        if ticket := self._loading.pop(model, None):
            ticket.stop.set()
        if live := self._live.pop(model, None):
            for submission in [one for one in self._preparing.values() if one.model == model]:
                del self._preparing[submission.request.id]
                self._hand_out(_cancelled(submission))
            self._hand_out(live.engine.cancel_all())
            self._log.info("unloaded", model=model)
        del live
        release_memory()
        self._outbox.send(pb.AttachResponse(unloaded=pb.Unloaded(model=model)))

    def _attach(self, outbox: Outbox) -> None:
        self._outbox = outbox
        ready = pb.Ready(device=self._device.name, description=self._device.description())
        outbox.send(pb.AttachResponse(ready=ready))

    def _detach(self, outbox: Outbox) -> None:
        """Nobody is left to make tokens for; the models stay for the next front."""
        if outbox is self._outbox:
            self._preparing.clear()
            for live in self._live.values():
                live.engine.cancel_all()

    def _pong(self) -> pb.AttachResponse:
        memory = self._device.memory()
        pong = pb.Pong(
            resident_bytes=self._process.memory_info().rss,
            total_bytes=memory.total,
            free_bytes=memory.free,
            warm=self._loader.warm,
            kv=[
                pb.KvUse(model=model, kv_bytes=live.engine.status().kv_bytes)
                for model, live in self._live.items()
            ],
        )
        return pb.AttachResponse(pong=pong)


def _cancelled(submission: Submission) -> list[Output]:
    """Return the ends of all outputs of a request that no engine has seen."""
    request = submission.request
    return [Output(request.id, finish=Finish.CANCELLED, index=index) for index in range(request.n)]
