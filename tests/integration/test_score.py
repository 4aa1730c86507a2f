"""Score through a real server, against the scripted engine."""

from __future__ import annotations

import asyncio
import math
import threading
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode

from lowbit import AsyncClient, DeadlineExceededError
from lowbit.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

CONTEXT_TOKENS = 64
BIT = math.log(2)


@pytest.fixture(scope="module")
def echo(service: Any) -> str:
    """A model that repeats its prompt; the id after a token of the script has a half of it."""
    return service.load_scripted("echo", step_ms=1, context_tokens=CONTEXT_TOKENS)


@pytest.fixture(scope="module")
def silent(service: Any) -> str:
    """A model that takes a minute to read a prompt."""
    return service.load_scripted("silent", step_ms=5, prefill_ms=60_000)


def test_continuations_are_scored_in_their_order(service: Any, echo: str) -> None:
    first, second = service.client.tokenize(echo, "ab").token_ids
    continuations = [[first, second, first], [first + 1, second], [second]]
    response = service.client.score(echo, "ab", continuations=continuations)
    wanted = [[1, 1, 1], [2, 1], [1 + (second - first) % 256]]
    for score, bits in zip(response.scores, wanted, strict=True):
        assert score.token_logprobs == pytest.approx([-BIT * one for one in bits])
        assert score.logprob == pytest.approx(-BIT * sum(bits))
    assert [score.is_greedy for score in response.scores] == [True, False, False]
    assert response.usage == pb.Usage(prompt_tokens=2, output_tokens=6)


def test_a_prompt_may_be_token_ids(service: Any, echo: str) -> None:
    response = service.client.score(echo, token_ids=[5, 9], continuations=[[5, 9, 5]])
    assert response.scores[0].is_greedy


async def test_the_async_client_scores(service: Any, echo: str) -> None:
    async with AsyncClient(service.server.address) as client:
        response = await client.score(echo, token_ids=[5], continuations=[[5]])
    assert response.scores[0].is_greedy


@pytest.mark.parametrize(
    ("continuations", "field"),
    [
        ([], "continuations"),
        ([[1], []], "continuations[1].ids"),
        ([[1], [2, 256]], "continuations[1].ids"),
        ([[1]] * 1025, "continuations"),
    ],
)
def test_bad_continuations_are_refused(
    service: Any, echo: str, continuations: list[list[int]], field: str
) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        service.once.score(echo, "ab", continuations=continuations)
    assert refusal.error.violations[0].field == field


def test_what_is_longer_than_the_context_is_refused(service: Any, echo: str) -> None:
    fits = [1] * (CONTEXT_TOKENS - 2)
    assert service.client.score(echo, "ab", continuations=[fits]).scores
    with service.refused(StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED") as refusal:
        service.once.score(echo, "ab", continuations=[[1], [*fits, 1]])
    assert "continuation 1" in refusal.error.message
    assert refusal.error.metadata["context_tokens"] == str(CONTEXT_TOKENS)
    with service.refused(StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED"):
        service.once.score(echo, "x" * CONTEXT_TOKENS, continuations=[[1]])
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        service.once.score(echo, "", continuations=[[1]])


def test_a_model_that_is_not_there_or_not_live(service: Any) -> None:
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.once.score("nobody", "ab", continuations=[[1]])
    name = service.import_scripted("asleep")
    with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED"):
        service.once.score(name, "ab", continuations=[[1]])


def test_a_deadline_frees_the_slot(
    service: Any, silent: str, eventually: Callable[..., Any]
) -> None:
    with pytest.raises(DeadlineExceededError):
        service.once.score(silent, "ab", continuations=[[1]], timeout=0.3)
    eventually(lambda: not service.client.devices()[0].workers[0].running_requests)


async def test_leaving_frees_the_slot(
    service: Any, silent: str, eventually: Callable[..., Any]
) -> None:
    def running() -> int:
        return service.client.devices()[0].workers[0].running_requests

    async with AsyncClient(service.server.address) as client:
        task = asyncio.create_task(client.score(silent, "ab", continuations=[[1]]))
        await asyncio.to_thread(eventually, lambda: running() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(eventually, lambda: running() == 0)


def test_a_model_that_is_unloaded_fails_the_score(
    service: Any, eventually: Callable[..., Any]
) -> None:
    name = service.load_scripted("leaving", prefill_ms=60_000)
    found: list[str] = []

    def score() -> None:
        with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED") as refusal:
            service.once.score(name, "ab", continuations=[[1]])
        found.append(refusal.error.message)

    thread = threading.Thread(target=score)
    thread.start()
    eventually(lambda: service.client.devices()[0].workers[0].running_requests)
    service.client.unload(name, force=True)
    thread.join(30)
    assert found == ["the model was unloaded"]


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("error", StatusCode.INTERNAL, "INTERNAL"),
        ("exit", StatusCode.UNAVAILABLE, "WORKER_LOST"),
    ],
)
def test_a_failure_is_told(
    service: Any, eventually: Callable[..., Any], kind: str, code: StatusCode, reason: str
) -> None:
    name = service.load_scripted(f"fails-{kind}", faults=[{"kind": kind}])
    with service.refused(code, reason):
        service.once.score(name, "ab", continuations=[[1]])
    eventually(service.ready)
