"""Log-probabilities, echo and several outputs through a real server, by script."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode

from lowbit.v1 import generation_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SERVER_ENVIRONMENT = {"LOWBIT_MAX_ADMITTED_REQUESTS": "8", "LOWBIT_MAX_RUNNING_REQUESTS": "6"}
HALF = pytest.approx(-math.log(2))
"""The script's own token; the ids after it have half as much each."""


@pytest.fixture(scope="module")
def echo(service: Any) -> str:
    """A model that repeats its prompt."""
    return service.load_scripted("echo", step_ms=1, context_tokens=2048)


def tokens_of(events: Iterable[pb.GenerateResponse], index: int = 0) -> list[pb.Token]:
    deltas = [event.delta for event in events if event.HasField("delta")]
    return [token for delta in deltas if delta.output_index == index for token in delta.tokens]


def texts_of(events: Iterable[pb.GenerateResponse]) -> dict[int, str]:
    texts: defaultdict[int, str] = defaultdict(str)
    for event in events:
        if event.HasField("delta"):
            texts[event.delta.output_index] += event.delta.text
    return dict(texts)


def ends_of(events: Iterable[pb.GenerateResponse]) -> dict[int, pb.OutputFinished]:
    finished = [event.output_finished for event in events if event.HasField("output_finished")]
    assert len({one.output_index for one in finished}) == len(finished)
    return {one.output_index: one for one in finished}


# Log-probabilities


@pytest.mark.parametrize("top", [0, 1, 5, 100])
def test_each_token_has_its_log_probability_and_the_likeliest(
    service: Any, echo: str, top: int
) -> None:
    ids = list(service.client.tokenize(echo, "héllo").token_ids)
    events = service.generate(echo, "héllo", stopping={"max_tokens": 6}, output={"logprobs": top})
    tokens = tokens_of(events)
    assert [token.id for token in tokens] == ids
    for token in tokens:
        assert token.logprob == HALF
        assert [one.token_id for one in token.top] == [
            (token.id + rank) % 256 for rank in range(top)
        ]
        assert [one.logprob for one in token.top] == pytest.approx(
            [-math.log(2) * (1 + rank) for rank in range(top)]
        )


def test_the_token_that_ends_an_output_is_reported_and_what_follows_a_stop_string_is_not(
    service: Any, echo: str
) -> None:
    (stop,) = service.client.tokenize(echo, "l").token_ids
    for stopping in ({"token_ids": [stop]}, {"strings": ["l"]}):
        events = service.generate(echo, "hello", stopping=stopping, output={"logprobs": 0})
        tokens = tokens_of(events)
        assert len(tokens) == events[-1].completed.usage.output_tokens == 3
        assert tokens[-1].id == stop
        assert all(token.HasField("logprob") for token in tokens)


def test_who_does_not_ask_gets_none_beside_one_who_asks(service: Any, echo: str) -> None:
    asking = service.stream(echo, "ab", stopping={"max_tokens": 100}, output={"logprobs": 2})
    plain = service.generate(echo, "ab", stopping={"max_tokens": 20}, output={"token_ids": True})
    assert all(not token.HasField("logprob") and not token.top for token in tokens_of(plain))
    assert len(tokens_of(asking)) == 100


def test_the_sdk_gives_them_with_the_chunks(service: Any, echo: str) -> None:
    stream = service.client.generate(echo, "ab", max_tokens=2, logprobs=2)
    chunks = list(stream)
    (first, second) = (token for chunk in chunks for token in chunk.token_ids)
    assert [one for chunk in chunks for one in chunk.logprobs] == [HALF, HALF]
    top = [one for chunk in chunks for one in chunk.top_logprobs]
    assert [list(one) for one in top] == [[first, first + 1], [second, second + 1]]


def test_too_many_alternatives_are_refused(service: Any, echo: str) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        service.generate(echo, "ab", output={"logprobs": 101})


# Echo


def test_the_prompt_comes_first_and_stops_are_not_looked_for_in_it(service: Any, echo: str) -> None:
    events = service.generate(
        echo, "a stop b", stopping={"strings": ["op"], "max_tokens": 20}, output={"echo": True}
    )
    assert texts_of(events) == {0: "a stop ba st"}
    assert not tokens_of(events)
    usage = events[-1].completed.usage
    assert (usage.prompt_tokens, usage.output_tokens) == (8, 6)


def test_the_echo_comes_with_log_probabilities(service: Any, echo: str) -> None:
    text = "日本 " * 200  # more than one event's worth of tokens
    ids = list(service.client.tokenize(echo, text).token_ids)
    events = service.generate(
        echo, text, stopping={"max_tokens": 7}, output={"echo": True, "logprobs": 1}
    )
    assert texts_of(events) == {0: text + "日本 "}
    tokens = tokens_of(events)
    assert [token.id for token in tokens] == ids + ids[:7]
    assert not tokens[0].HasField("logprob")
    assert not tokens[0].top
    for token in tokens[1:]:
        assert token.logprob == HALF
        assert [one.token_id for one in token.top] == [token.id]
    assert max(len(event.delta.tokens) for event in events) == 256


def test_a_character_that_the_prompt_begins_is_echoed_whole(service: Any, echo: str) -> None:
    events = service.generate(
        echo,
        "é".encode()[:1] + "é".encode(),
        stopping={"max_tokens": 3},
        output={"echo": True, "token_ids": True},
    )
    ids = [token.id for token in tokens_of(events)]
    assert texts_of(events)[0] == service.client.detokenize(echo, ids)


# Several outputs


def test_outputs_have_their_own_text_and_end(service: Any, echo: str) -> None:
    events = service.generate(
        echo, "abcd", sampling={"n": 3}, stopping={"max_tokens": 6}, output={"token_ids": True}
    )
    assert texts_of(events) == {0: "abcdab", 1: "bcdabc", 2: "cdabcd"}
    assert [len(tokens_of(events, index)) for index in range(3)] == [6, 6, 6]
    assert ends_of(events) == {
        index: pb.OutputFinished(output_index=index, reason=pb.FINISH_REASON_MAX_TOKENS)
        for index in range(3)
    }
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "completed"
    assert kinds.count("started") == kinds.count("completed") == 1
    assert [event.sequence for event in events] == list(range(len(events)))
    usage = events[-1].completed.usage
    assert (usage.prompt_tokens, usage.output_tokens) == (4, 18)


def test_each_output_stops_at_its_own_place(service: Any, eventually: Callable[..., Any]) -> None:
    name = service.load_scripted("stops", step_ms=2, tokens=[*range(60, 90)])
    stop = service.client.detokenize(name, [65])
    stopping = {"strings": [stop], "max_tokens": 1000}
    # Output i begins at token i of the script: 6 - i tokens up to the stop.
    events = service.generate(name, "x", sampling={"n": 6}, stopping=stopping)
    finished = ends_of(events)
    assert all(one.stop_string == stop for one in finished.values())
    assert events[-1].completed.usage.output_tokens == sum(range(1, 7))
    eventually(lambda: not service.client.devices()[0].workers[0].running_requests)


def test_one_stops_early_and_its_slot_is_free(service: Any, eventually: Callable[..., Any]) -> None:
    name = service.load_scripted("uneven", step_ms=5, tokens=[*range(60, 90), *[1] * 5000])
    stop = service.client.detokenize(name, [61])
    stream = service.stream(
        name, "x", sampling={"n": 3}, stopping={"strings": [stop], "max_tokens": 1500}
    )
    events = []
    for event in stream:
        events.append(event)
        if len(ends_of(events)) == 2:
            break
    assert set(ends_of(events)) == {0, 1}
    worker = lambda: service.client.devices()[0].workers[0]  # noqa: E731
    eventually(lambda: worker().running_requests == 1)
    stream.cancel()
    eventually(lambda: worker().running_requests == 0)


def test_leaving_ends_all_outputs(service: Any, echo: str, eventually: Callable[..., Any]) -> None:
    stream = service.stream(echo, "ab", sampling={"n": 5}, stopping={"max_tokens": 1500})
    next(stream)
    eventually(lambda: service.client.devices()[0].workers[0].running_requests == 5)
    stream.cancel()
    eventually(lambda: service.client.devices()[0].workers[0].running_requests == 0)

    def admitted() -> int:
        with service.once.watch_runtime(0.1) as snapshots:
            return next(snapshots).admitted_requests

    eventually(lambda: admitted() == 0)


def test_each_output_counts_as_a_request(service: Any, echo: str) -> None:
    stream = service.stream(echo, "ab", sampling={"n": 6}, stopping={"max_tokens": 1500})
    next(stream)
    with service.refused(StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"):
        service.generate(echo, "ab", sampling={"n": 3})
    stream.cancel()
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        service.generate(echo, "ab", sampling={"n": 7})
    assert "at most 6 outputs" in refusal.error.message


def test_the_time_limit_ends_all_outputs(service: Any, echo: str) -> None:
    events = service.generate(
        echo, "ab", sampling={"n": 3}, stopping={"time_limit": {"nanos": 50_000_000}}
    )
    assert {one.reason for one in ends_of(events).values()} == {pb.FINISH_REASON_TIME_LIMIT}
    assert len(ends_of(events)) == 3


def test_a_failure_ends_the_whole_stream(service: Any) -> None:
    faults = [{"kind": "error", "after_tokens": 3}]
    name = service.load_scripted("fails", step_ms=1, faults=faults)
    with service.refused(StatusCode.INTERNAL, "INTERNAL") as refusal:
        service.generate(name, "hello", sampling={"n": 2})
    assert refusal.error.metadata["output_tokens"] == "6"


def test_each_output_is_preceded_by_the_echo(service: Any, echo: str) -> None:
    events = service.generate(
        echo,
        "abc",
        sampling={"n": 2},
        stopping={"max_tokens": 2},
        output={"echo": True, "logprobs": 0},
    )
    assert texts_of(events) == {0: "abcab", 1: "abcbc"}
    for index in range(2):
        found = [token.HasField("logprob") for token in tokens_of(events, index)]
        assert found == [False, True, True, True, True]


def test_the_sdk_reads_all_texts(service: Any, echo: str) -> None:
    stream = service.client.generate(echo, "abc", max_tokens=3, n=3, stop="cab")
    assert stream.texts() == ["abc", "bca", ""]
    assert stream.text() == "abc"


# Bias and bad words


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_bias", [{"token_id": 256, "bias": 1}]),
        ("logit_bias", [{"token_id": 1, "bias": 1001}]),
        ("logit_bias", [{"token_id": 1, "bias": math.nan}]),
        ("bad_words", [{"ids": [1, 256]}]),
        ("bad_words", [{"ids": []}]),
        ("bad_words", [{"ids": [1] * 65}]),
        ("bad_words", [{"ids": [token]} for token in range(256)]),
        ("typical_p", 0.0),
        ("typical_p", 1.5),
        ("n", 0),
        ("n", 129),
    ],
)
def test_what_makes_no_sense_is_refused(service: Any, echo: str, field: str, value: Any) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        service.generate(echo, "ab", sampling={field: value})
    assert refusal.error.violations[0].field.startswith(f"sampling.{field}")
