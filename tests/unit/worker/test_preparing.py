"""Grammars that are compiled while the step loop goes on."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Any

import pytest

from lowbit.v1.generation_pb2 import FinishReason, OutputConstraint
from lowbit.worker.v1 import worker_pb2 as pb
from lowbit_server.engine.engine import Status
from lowbit_server.grammar.spec import Grammar, GrammarError
from lowbit_server.worker.convert import submission
from lowbit_server.worker.device import Cpu
from lowbit_server.worker.inbox import Attached, Detached, Inbox
from lowbit_server.worker.loop import Live, StepLoop
from lowbit_server.worker.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbit_server.engine.request import Output, Request
    from tests.unit.worker.harness import Front

CANCELLED = FinishReason.FINISH_REASON_CANCELLED
DEADLINE_S = 30.0


class Vocabulary:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.go = Event()
        self.matcher = object()

    def compile(self, grammar: Grammar) -> object:
        assert self.go.wait(DEADLINE_S)
        if grammar.text == "bad":
            message = "it is no good"
            raise GrammarError(message)
        return self.matcher


class Engine:
    """Keeps what it is given."""

    context_tokens = 100

    def __init__(self) -> None:
        self.submitted: list[Request] = []

    def submit(self, request: Request) -> list[Output]:
        self.submitted.append(request)
        return []

    def cancel(self, request_id: int, index: int | None = None) -> list[Output]:
        return []

    def cancel_all(self) -> list[Output]:
        return []

    def status(self) -> Status:
        return Status(None, 0, 0, 0)


class Stage:
    """A step loop with one live model, driven by hand."""

    def __init__(self) -> None:
        self.inbox, self.outbox = Inbox(), Outbox()
        self.engine, self.vocabulary = Engine(), Vocabulary()
        loader: Any = None
        self.loop = StepLoop(self.inbox, loader, Cpu())
        vocabulary: Any = self.vocabulary
        self.loop._live["m"] = Live(self.engine, 0, vocabulary)
        self.loop._obey(Attached(self.outbox))
        assert next(self.outbox).HasField("ready")

    def submit(self, number: int, pattern: str = "a", n: int = 1) -> None:
        constraint = OutputConstraint(regex=pattern) if pattern else None
        message = pb.Submit(request=number, model="m", prompt=[1], n=n, constraint=constraint)
        self.loop._obey(submission(message, 0.0))

    def finish_compiling(self) -> None:
        self.vocabulary.go.set()
        self.loop._obey(self.inbox.get(timeout=DEADLINE_S))

    def told(self) -> list[pb.Output]:
        """Return what the front has been told since it was asked last."""
        events = []
        while self.outbox._events:
            events.append(next(self.outbox))
        return [output for event in events for output in event.step.outputs]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_request_waits_for_its_grammar_and_holds_nobody_up(stage: Stage) -> None:
    stage.submit(1)
    stage.submit(2, pattern="")
    assert [one.id for one in stage.engine.submitted] == [2]
    stage.finish_compiling()
    assert [one.id for one in stage.engine.submitted] == [2, 1]
    assert stage.engine.submitted[1].matcher is stage.vocabulary.matcher
    assert stage.told() == []


def test_a_grammar_that_does_not_compile_ends_its_request(stage: Stage) -> None:
    stage.submit(1, pattern="bad")
    stage.finish_compiling()
    (told,) = stage.told()
    assert (told.request, told.error, told.refused) == (1, "it is no good", True)
    assert stage.engine.submitted == []


@pytest.mark.parametrize("command", [pb.Cancel(request=1), pb.Unload(model="m")])
def test_who_is_cancelled_meanwhile_gets_all_ends_and_no_slot(
    stage: Stage, command: pb.Cancel | pb.Unload
) -> None:
    stage.submit(1, n=2)
    stage.loop._obey(command)
    assert [(one.request, one.index, one.finish) for one in stage.told()] == [
        (1, 0, CANCELLED),
        (1, 1, CANCELLED),
    ]
    stage.finish_compiling()
    assert stage.engine.submitted == []
    assert stage.told() == []


def test_a_front_that_is_gone_takes_its_requests_along(stage: Stage) -> None:
    stage.submit(1)
    stage.loop._obey(Detached(stage.outbox))
    stage.finish_compiling()
    assert stage.engine.submitted == []


def test_a_scripted_model_follows_no_grammar(
    front: Front, load_scripted: Callable[..., str]
) -> None:
    model = load_scripted(step_ms=1)
    constraint = OutputConstraint(regex="a")
    ended = front.finished(front.submit(model, [1], max_tokens=2, constraint=constraint))
    assert "no grammar" in ended.error
    assert ended.tokens == []
