"""Generation streams of the blocking client against a real server."""

from __future__ import annotations

import gc
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from lowbit import (
    CancelledError,
    Chunk,
    Client,
    DeadlineExceededError,
    WorkerLostError,
)
from lowbit.v1.generation_pb2 import (
    FINISH_REASON_EOS,
    FINISH_REASON_MAX_TOKENS,
    ROLE_SYSTEM,
    ROLE_USER,
    ChatMessage,
    Choice,
    Delta,
    GenerateResponse,
    OutputFinished,
    Token,
    TopLogprob,
)
from tests.unit.client.fake import Endless, events, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from tests.unit.client.fake import FakeServer


def test_chunks_come_one_by_one_and_the_figures_at_the_end(
    server: FakeServer, client: Client
) -> None:
    server.on["Generate"] = lambda *_: events("Par", "is", "")
    stream = client.generate("m", "prompt")
    assert stream.started is None
    assert stream.usage is None
    assert stream.finish_reason is None
    chunks = list(stream)
    assert chunks == [Chunk("Par", (0,)), Chunk("is", (1,)), Chunk("", (2,))]
    assert str(chunks[0]) == "Par"
    assert stream.started is not None
    assert stream.started.prompt_tokens == 3
    assert stream.finish_reason == FINISH_REASON_EOS
    assert stream.usage is not None
    assert stream.usage.output_tokens == 3
    assert stream.timings is not None
    assert stream.timings.decode.seconds == 2
    assert list(stream) == []


def test_control_c_is_itself_wherever_it_meets_a_read(server: FakeServer, client: Client) -> None:
    """It falls between the lines of `Condition.wait` that let go of the lock and begin `try`."""
    server.on["Generate"] = endless = Endless()
    stream = client.generate("m", "p")
    next(stream)

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        if frame.f_code is not threading.Condition.wait.__code__:
            return None
        if "saved_state" in frame.f_locals:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        sys.settrace(before)
    stream.close()
    assert endless.was_cancelled()


def test_text_holds_what_was_iterated_before(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda *_: events("a", "b", "c")
    stream = client.generate("m", "prompt")
    assert next(stream).text == "a"
    assert stream.partial_text == "a"
    assert stream.text() == "abc"
    assert stream.text() == "abc"


def test_each_output_has_its_own_text_and_end(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda *_: iter(
        [
            *(
                GenerateResponse(delta=Delta(output_index=index, text=text))
                for index, text in ((1, "b"), (0, "a"), (1, "B"))
            ),
            *(
                GenerateResponse(output_finished=OutputFinished(output_index=index, reason=reason))
                for index, reason in ((1, FINISH_REASON_EOS), (0, FINISH_REASON_MAX_TOKENS))
            ),
        ]
    )
    stream = client.generate("m", "prompt", n=2)
    assert [chunk.output_index for chunk in stream] == [1, 0, 1]
    assert stream.texts() == ["a", "bB"]
    assert stream.partial_text == "a"
    assert stream.finish_reason == FINISH_REASON_MAX_TOKENS
    assert stream.all_finished[1].reason == FINISH_REASON_EOS


def test_log_probabilities_are_in_the_chunks(server: FakeServer, client: Client) -> None:
    first = Token(id=4)
    second = Token(id=5, logprob=-0.5, top=[TopLogprob(token_id=5, logprob=-0.5)])
    server.on["Generate"] = lambda *_: iter(
        [GenerateResponse(delta=Delta(text="ab", tokens=[first, second]))]
    )
    (chunk,) = client.generate("m", "prompt", logprobs=1)
    assert chunk == Chunk("ab", (4, 5), 0, (None, -0.5), ({}, {5: -0.5}))


def test_the_call_is_under_way_before_anything_is_read(server: FakeServer, client: Client) -> None:
    called = threading.Event()

    def generate(*_: object) -> Iterator[GenerateResponse]:
        called.set()
        return events("a")

    server.on["Generate"] = generate
    with client.generate("m", "prompt"):
        assert called.wait(10)


def test_every_option_reaches_its_field(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda *_: events()
    client.generate(
        "m",
        messages=[("system", "s"), {"role": "user", "content": "u"}, ChatMessage(role=ROLE_USER)],
        max_tokens=8,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=4,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=0,
        stop="end",
        stop_token_ids=[5],
        ignore_eos=True,
        time_limit=1.5,
        token_ids_output=True,
        typical_p=0.75,
        logit_bias={7: -1.5},
        bad_words=[[1, 2], (3,)],
        n=2,
        logprobs=0,
        echo=True,
        regex="a+",
        deterministic=True,
        prompt_lookup_tokens=4,
        cache_salt="s",
        request_id="r",
    ).text()
    (request,) = server.requests("Generate")
    assert [m.role for m in request.chat.messages] == [ROLE_SYSTEM, ROLE_USER, ROLE_USER]
    sampling, stopping = request.sampling, request.stopping
    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0, 0.5, 4)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (stopping.max_tokens, stopping.min_tokens, stopping.ignore_eos) == (8, 2, True)
    assert list(stopping.strings) == ["end"]
    assert list(stopping.token_ids) == [5]
    assert stopping.time_limit.ToMilliseconds() == 1500
    assert (sampling.typical_p, sampling.n) == (0.75, 2)
    assert [(one.token_id, one.bias) for one in sampling.logit_bias] == [(7, -1.5)]
    assert [list(word.ids) for word in sampling.bad_words] == [[1, 2], [3]]
    assert request.output.token_ids
    assert request.output.echo
    assert request.output.HasField("logprobs")
    assert request.output.logprobs == 0
    assert request.constraint.regex == "a+"
    assert (request.deterministic, request.prompt_lookup_tokens) == (True, 4)
    assert (request.cache_salt, request.request_id) == ("s", "r")


def test_what_is_not_given_is_not_set(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda *_: events()
    client.generate("m", "").text()
    (request,) = server.requests("Generate")
    assert request.WhichOneof("input") == "text"
    assert request.sampling.ListFields() == []
    assert request.output.ListFields() == []
    assert request.stopping.ListFields() == []
    assert not request.HasField("constraint")


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"json_schema": {"type": "string", "title": "é"}}, "json_schema", None),
        ({"json_schema": "true"}, "json_schema", "true"),
        ({"regex": ""}, "regex", ""),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        ({"choice": ("a", "b")}, "choice", Choice(options=["a", "b"])),
    ],
)
def test_each_constraint_reaches_its_field(
    server: FakeServer, client: Client, given: dict[str, Any], field: str, value: Any
) -> None:
    server.on["Generate"] = lambda *_: events()
    client.generate("m", "", **given).text()
    (request,) = server.requests("Generate")
    assert request.constraint.WhichOneof("kind") == field
    sent = getattr(request.constraint, field)
    assert json.loads(sent) == given[field] if value is None else sent == value


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "a", "choice": ["a"]},
        {"choice": "a"},
        {"json_schema": {"minimum": float("nan")}},
    ],
)
def test_a_constraint_that_makes_no_sense_is_a_value_error(
    client: Client, given: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"give one of|list of strings|JSON compliant"):
        client.generate("m", "", **given)


@pytest.mark.parametrize(
    "inputs", [{}, {"prompt": "a", "token_ids": [1]}, {"prompt": "a", "messages": []}]
)
def test_there_is_exactly_one_input(client: Client, inputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        client.generate("m", **inputs)


@pytest.mark.parametrize("message", [("robot", "x"), {"role": "user"}])
def test_a_bad_chat_message_is_refused_here(client: Client, message: Any) -> None:
    with pytest.raises(ValueError, match="role"):
        client.generate("m", messages=[message])


def test_closing_cancels_the_call(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = endless = Endless()
    with client.generate("m", "prompt") as stream:
        assert next(stream).text == "first"
    assert endless.was_cancelled()
    with pytest.raises(CancelledError):
        next(stream)
    assert stream.partial_text == "first"


def test_dropping_cancels_the_call(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = endless = Endless()
    for chunk in client.generate("m", "prompt"):
        assert chunk.text == "first"
        break
    gc.collect()
    assert endless.was_cancelled()


def test_another_thread_can_cancel_a_reader_that_waits(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = endless = Endless()
    stream = client.generate("m", "prompt")
    next(stream)
    threading.Thread(target=stream.cancel).start()
    with pytest.raises(CancelledError):
        next(stream)
    assert endless.was_cancelled()


def test_closing_after_the_end_changes_nothing(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = lambda *_: events("a")
    with client.generate("m", "prompt") as stream:
        stream.text()
    stream.close()
    assert stream.text() == "a"


def test_a_worker_lost_midway_keeps_the_text_and_is_not_retried(
    server: FakeServer, client: Client
) -> None:
    def generate(_: object, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        yield GenerateResponse(delta=Delta(text="par"))
        refuse(context, grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", retry_s=0)

    server.on["Generate"] = generate
    stream = client.generate("m", "prompt")
    with pytest.raises(WorkerLostError):
        stream.text()
    assert stream.partial_text == "par"
    assert len(server.seen) == 1


def test_a_deadline_ends_the_stream(server: FakeServer, client: Client) -> None:
    server.on["Generate"] = endless = Endless()
    stream = client.generate("m", "prompt", timeout=0.5)
    next(stream)
    with pytest.raises(DeadlineExceededError):
        next(stream)
    assert endless.was_cancelled()
