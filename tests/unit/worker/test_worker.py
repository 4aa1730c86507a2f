"""Requests of a worker process over its real socket, with the scripted engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lowbit.v1.generation_pb2 import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.worker.harness import Front

    Load = Callable[..., str]


def test_a_request_gets_the_tokens_of_the_script(front: Front, load_scripted: Load) -> None:
    model = load_scripted(tokens=[7, 8, 9], step_ms=1)
    ended = front.finished(front.submit(model, [1, 2], max_tokens=5))
    assert ended.tokens == [7, 8, 9, 7, 8]
    assert ended.finish == FinishReason.FINISH_REASON_MAX_TOKENS
    assert len(ended.queue_us) == 1


def test_without_tokens_the_script_repeats_the_prompt(front: Front, load_scripted: Load) -> None:
    model = load_scripted(step_ms=1)
    assert front.finished(front.submit(model, [4, 5], max_tokens=3)).tokens == [4, 5, 4]


@pytest.mark.parametrize(
    ("fields", "tokens", "finish"),
    [
        ({"eos_token_ids": [3]}, [1, 2, 3], FinishReason.FINISH_REASON_EOS),
        ({"stop_token_ids": [2]}, [1, 2], FinishReason.FINISH_REASON_STOP),
        (
            {"stop_token_ids": [1], "min_tokens": 1},
            [1, 2, 3, 1],
            FinishReason.FINISH_REASON_STOP,
        ),
        ({"max_tokens": 100}, [1, 2, 3, 1, 2, 3, 1, 2], FinishReason.FINISH_REASON_CONTEXT_LIMIT),
        (
            {"prompt": range(10), "max_tokens": 100},
            [],
            FinishReason.FINISH_REASON_CONTEXT_LIMIT,
        ),
    ],
)
def test_finish_reasons(
    front: Front,
    load_scripted: Load,
    fields: dict[str, object],
    tokens: list[int],
    finish: FinishReason.ValueType,
) -> None:
    model = load_scripted(tokens=[1, 2, 3], step_ms=1, context_tokens=10)
    request = {"prompt": [9, 9], "max_tokens": 6} | fields
    ended = front.finished(front.submit(model, **request))
    assert (ended.tokens, ended.finish) == (tokens, finish)


def test_a_time_limit_ends_a_request(front: Front, load_scripted: Load) -> None:
    model = load_scripted(step_ms=1)
    ended = front.finished(front.submit(model, [1], max_tokens=2000, time_limit_ms=20))
    assert ended.finish == FinishReason.FINISH_REASON_TIME_LIMIT
    assert len(ended.tokens) < 2000


def test_a_cancelled_request_ends_within_a_step(front: Front, load_scripted: Load) -> None:
    model = load_scripted(step_ms=20)
    request = front.submit(model, [1], max_tokens=2000)
    seen = len(front.produced(request, 3).tokens)
    front.cancel(request)
    ended = front.finished(request)
    assert ended.finish == FinishReason.FINISH_REASON_CANCELLED
    assert len(ended.tokens) <= seen + 1


def test_a_cancel_does_not_wait_for_a_long_step(front: Front, load_scripted: Load) -> None:
    model = load_scripted(step_ms=3_600_000)
    request = front.submit(model, [1], max_tokens=5)
    front.produced(request, 1)
    front.cancel(request)
    assert front.finished(request).finish == FinishReason.FINISH_REASON_CANCELLED


def test_one_message_a_step_carries_all_requests(front: Front, load_scripted: Load) -> None:
    model = load_scripted(step_ms=5)
    requests = [front.submit(model, [index + 1], max_tokens=40) for index in range(32)]
    for index, request in enumerate(requests):
        assert front.finished(request).tokens == [index + 1] * 40
    assert max(len(step.outputs) for step in front.steps) == 32
    assert max(step.running for step in front.steps) == 32
    # All joined during the first steps: not one message per token.
    assert len(front.steps) < 32 * 40 / 4
    assert front.steps[-1].running == 0


def test_requests_wait_for_a_slot_and_say_how_long(front: Front, load_scripted: Load) -> None:
    model = load_scripted(step_ms=5, max_running=1)
    first, second = (front.submit(model, [1], max_tokens=10) for _ in range(2))
    front.finished(second)
    assert max(step.waiting for step in front.steps) == 1
    assert front.results[second].queue_us[0] > front.results[first].queue_us[0]
    # Ten steps of 5 ms, of which the first is at once.
    assert front.results[second].queue_us[0] >= 40_000


def test_a_scripted_error_fails_only_its_request(front: Front, load_scripted: Load) -> None:
    model = load_scripted(
        step_ms=1, faults=[{"kind": "error", "after_tokens": 2, "if_prompt_has": 66}]
    )
    good, bad = front.submit(model, [1], max_tokens=9), front.submit(model, [66], max_tokens=9)
    assert front.finished(bad).error == "scripted error"
    assert front.results[bad].tokens == [66, 66]
    assert front.finished(good).tokens == [1] * 9
    assert front.results[bad].ends == front.results[good].ends == 1


def test_a_request_for_a_model_that_is_not_live_fails(front: Front) -> None:
    assert front.finished(front.submit("nowhere", [1], max_tokens=1)).error


def test_an_empty_prompt_fails(front: Front, load_scripted: Load) -> None:
    assert front.finished(front.submit(load_scripted(), [], max_tokens=1)).error


def test_two_models_take_turns(front: Front, load_scripted: Load) -> None:
    one, two = load_scripted("one", step_ms=0), load_scripted("two", step_ms=0)
    requests = [front.submit(model, [1], max_tokens=1500) for model in (one, two)]
    while not any(front.results[request].ends for request in requests):
        front.next_event()
    # The second began a little later, but did not wait for the first to end.
    assert all(len(front.results[request].tokens) > 300 for request in requests)
    for request in requests:
        front.finished(request)
