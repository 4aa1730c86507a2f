"""GenerationService through a real server: events, text, ends, refusals and logs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode

from lowbit.v1 import generation_pb2 as pb
from lowbit_server.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SERVER_ENVIRONMENT = {"LOWBIT_MAX_ADMITTED_REQUESTS": "4"}
CONTEXT_TOKENS = 512


@pytest.fixture(scope="module")
def echo(service: Any) -> str:
    """A model that repeats its prompt: what a test sends is what it gets."""
    return service.load_scripted("echo", step_ms=1, context_tokens=CONTEXT_TOKENS)


@pytest.fixture(scope="module")
def silent(service: Any) -> str:
    """A model that takes a minute before its first token."""
    return service.load_scripted("silent", step_ms=5, prefill_ms=60_000)


def text_of(events: Iterable[pb.GenerateResponse]) -> str:
    return "".join(event.delta.text for event in events)


def finish_of(events: Iterable[pb.GenerateResponse]) -> pb.OutputFinished:
    (finished,) = [one.output_finished for one in events if one.HasField("output_finished")]
    return finished


def usage_of(events: list[pb.GenerateResponse]) -> tuple[int, int]:
    usage = events[-1].completed.usage
    return usage.prompt_tokens, usage.output_tokens


# Events


def test_events_come_in_order_and_are_numbered_without_gaps(service: Any, echo: str) -> None:
    events = service.generate(echo, "hello", stopping={"max_tokens": 12})
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-2:] == ["output_finished", "completed"]
    assert set(kinds[1:-2]) == {"delta"}
    assert [event.sequence for event in events] == list(range(len(events)))
    assert text_of(events) == "hellohellohe"


def test_started_names_request_model_device_and_prompt(service: Any, echo: str) -> None:
    service.client.set_alias("the-alias", echo)
    started = service.generate(
        "the-alias", "hello", stopping={"max_tokens": 1}, request_id="my.request:1"
    )[0].started
    assert started == pb.Started(
        request_id="my.request:1",
        model=echo,
        model_revision=service.client.get_model(echo).revision,
        device="cpu",
        prompt_tokens=5,
    )
    assert started.model_revision


def test_a_request_without_an_id_gets_one_of_its_own(service: Any, echo: str) -> None:
    first, second = (
        service.generate(echo, "a", stopping={"max_tokens": 1})[0].started.request_id
        for _ in range(2)
    )
    assert first
    assert second
    assert first != second


def test_usage_and_timings(service: Any, echo: str) -> None:
    began = time.monotonic()
    events = service.generate(echo, "hello", stopping={"max_tokens": 20})
    took = time.monotonic() - began
    assert usage_of(events) == (5, 20)
    timings = events[-1].completed.timings
    queue, first, decode = (
        getattr(timings, name).ToNanoseconds() / 1e9
        for name in ("queue", "time_to_first_token", "decode")
    )
    assert 0 < queue <= first
    assert decode > 0
    assert first + decode <= took


def test_streams_at_the_same_time_each_get_their_own_tokens(service: Any, echo: str) -> None:
    prompts = ["alpha ", "beta ", "gamma "]
    streams = [service.stream(echo, text, stopping={"max_tokens": 60}) for text in prompts]
    for prompt, stream in zip(prompts, streams, strict=True):
        assert text_of(stream) == (prompt * 12)[:60]


# Inputs


def test_token_ids_are_used_as_they_are(service: Any, echo: str) -> None:
    events = service.generate(echo, b"\x00 raw \xc3\xa9", stopping={"max_tokens": 8})
    assert text_of(events) == "\x00 raw é"
    assert usage_of(events) == (8, 8)


def test_a_chat_is_rendered_with_the_models_template(service: Any, echo: str) -> None:
    rendered = "<system>be kind\n<user>hi\n<assistant>"
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role=pb.ROLE_SYSTEM, content="be kind"),
            pb.ChatMessage(role=pb.ROLE_USER, content="hi"),
        ]
    )
    request = pb.GenerateRequest(
        model=echo, chat=chat, stopping=pb.Stopping(max_tokens=len(rendered))
    )
    events = list(service.generation.Generate(request, timeout=30))
    assert text_of(events) == rendered
    assert events[0].started.prompt_tokens == len(rendered)


# Ends


def test_max_tokens_ends_an_output(service: Any, echo: str) -> None:
    events = service.generate(echo, "hello", stopping={"max_tokens": 3})
    assert finish_of(events) == pb.OutputFinished(reason=pb.FINISH_REASON_MAX_TOKENS)
    assert text_of(events) == "hel"


@pytest.mark.parametrize("max_tokens", [None, 4, 100])
def test_the_context_ends_an_output(service: Any, echo: str, max_tokens: int | None) -> None:
    prompt = "x" * (CONTEXT_TOKENS - 4)
    events = service.generate(echo, prompt, stopping={"max_tokens": max_tokens})
    assert finish_of(events).reason == pb.FINISH_REASON_CONTEXT_LIMIT
    assert usage_of(events) == (CONTEXT_TOKENS - 4, 4)


def test_a_time_limit_ends_an_output_well(service: Any, echo: str) -> None:
    events = service.generate(echo, "tick ", stopping={"time_limit": {"nanos": 100_000_000}})
    assert finish_of(events).reason == pb.FINISH_REASON_TIME_LIMIT
    used = usage_of(events)[1]
    assert 0 < used < CONTEXT_TOKENS - 5
    assert text_of(events) == ("tick " * used)[:used]


def test_a_time_limit_ends_a_request_that_has_no_token_yet(service: Any, silent: str) -> None:
    events = service.generate(silent, "hello", stopping={"time_limit": {"nanos": 50_000_000}})
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", "output_finished", "completed"]
    assert finish_of(events).reason == pb.FINISH_REASON_TIME_LIMIT
    assert usage_of(events) == (5, 0)


@pytest.mark.parametrize(
    ("output", "stops", "text", "matched"),
    [
        ("hello world", ["o w"], "hell", "o w"),
        ("hello world", ["h"], "", "h"),
        ("hello world", ["world", "lo"], "hel", "lo"),
        ("hello world", ["lo wo", "lo w"], "hel", "lo w"),
        ("aaab", ["aab"], "a", "aab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("one\ntwo\n\nthree", ["\n\n"], "one\ntwo", "\n\n"),
        ("終わり。次の文", ["。"], "終わり", "。"),
        ("so 😀 it ends", ["😀 it"], "so ", "😀 it"),
    ],
)
def test_a_stop_string_ends_an_output_and_is_not_emitted(  # noqa: PLR0913 - the case's columns
    service: Any, echo: str, output: str, stops: list[str], text: str, matched: str
) -> None:
    events = service.generate(echo, output, stopping={"strings": stops, "max_tokens": 200})
    assert text_of(events) == text
    assert finish_of(events) == pb.OutputFinished(reason=pb.FINISH_REASON_STOP, stop_string=matched)
    # One token a byte, up to the one that completes the stop string.
    assert usage_of(events)[1] == len((text + matched).encode())


def test_what_only_begins_like_a_stop_string_is_emitted_in_the_end(service: Any, echo: str) -> None:
    events = service.generate(echo, "hello w", stopping={"strings": ["world"], "max_tokens": 7})
    assert text_of(events) == "hello w"
    assert finish_of(events).reason == pb.FINISH_REASON_MAX_TOKENS


def test_a_stop_string_frees_the_slot(
    service: Any, echo: str, eventually: Callable[..., Any]
) -> None:
    service.generate(echo, "go and stop", stopping={"strings": ["stop"]})
    eventually(lambda: not service.client.devices()[0].workers[0].running_requests)


def test_a_stop_token_ends_an_output_and_is_not_emitted(service: Any, echo: str) -> None:
    (stop,) = service.client.tokenize(echo, "l").token_ids
    events = service.generate(echo, "hello", stopping={"token_ids": [stop], "max_tokens": 50})
    assert text_of(events) == "he"
    assert finish_of(events) == pb.OutputFinished(reason=pb.FINISH_REASON_STOP, stop_token_id=stop)
    assert usage_of(events)[1] == 3


def test_no_stop_before_min_tokens(service: Any, echo: str) -> None:
    (stop,) = service.client.tokenize(echo, "c").token_ids
    for rule in ({"strings": ["c"]}, {"token_ids": [stop]}):
        stopping = {"min_tokens": 4, "max_tokens": 50, **rule}
        events = service.generate(echo, "abc", stopping=stopping)
        assert text_of(events) == "abcab"
        assert finish_of(events).reason == pb.FINISH_REASON_STOP


def test_an_end_token_ends_an_output_unless_it_is_ignored(service: Any, echo: str) -> None:
    (end,) = service.client.tokenize(echo, "!").token_ids
    source = scripted_model(service.sources / "ending", step_ms=1)
    (source / "generation_config.json").write_text(f'{{"eos_token_id": {end}}}')
    service.client.wait_job(service.client.import_model("ending", path=str(source)).id)
    service.client.load("ending").wait()
    events = service.generate("ending", "done! or not", stopping={"max_tokens": 12})
    assert text_of(events) == "done"
    assert finish_of(events) == pb.OutputFinished(reason=pb.FINISH_REASON_EOS)
    assert usage_of(events)[1] == 5
    stopping = {"max_tokens": 12, "ignore_eos": True}
    events = service.generate("ending", "done! or not", stopping=stopping)
    assert text_of(events) == "done! or not"


# Text


@pytest.mark.parametrize(
    "text", ["日本語のテキスト", "😀👩‍👩‍👧‍👦🇯🇵", "naïve Ω ﷽ e\u0301", "a\u200db"]
)
def test_a_character_is_never_split(service: Any, echo: str, text: str) -> None:
    events = service.generate(echo, text, stopping={"max_tokens": len(text.encode())})
    deltas = [event.delta.text for event in events if event.HasField("delta")]
    assert "".join(deltas) == text
    assert len(deltas) > 1
    assert not any("\ufffd" in delta for delta in deltas)


@pytest.mark.parametrize(
    "output", ["😀".encode()[:3], b"a\xf0\x9f b", b"\xff\xfe", b"ok \xe6\x97", b"\x80\x80\x80x"]
)
def test_broken_bytes_become_what_decoding_all_at_once_gives(
    service: Any, echo: str, output: bytes
) -> None:
    events = service.generate(
        echo, output, stopping={"max_tokens": len(output)}, output={"token_ids": True}
    )
    ids = [token.id for event in events for token in event.delta.tokens]
    text = text_of(events)
    assert text == service.client.detokenize(echo, ids) == output.decode(errors="replace")
    assert "\ufffd" in text


def test_token_ids_are_reported_when_asked_for(service: Any, echo: str) -> None:
    ids = list(service.client.tokenize(echo, "héllo").token_ids)
    plain = service.generate(echo, "héllo", stopping={"max_tokens": 6})
    assert not any(event.delta.tokens for event in plain)
    asked = service.generate(echo, "héllo", stopping={"max_tokens": 6}, output={"token_ids": True})
    assert [token.id for event in asked for token in event.delta.tokens] == ids


# Tokenize and Detokenize


@pytest.mark.parametrize("text", ["plain", "日本語 😀", "", " \n\t\x00", "<|endoftext|>"])
def test_tokenize_and_detokenize_are_inverse(service: Any, echo: str, text: str) -> None:
    response = service.client.tokenize(echo, text)
    assert response.text == text
    assert len(response.token_ids) == len(text.encode())
    assert service.client.detokenize(echo, response.token_ids) == text


def test_a_chat_is_tokenized_as_generate_would(service: Any, echo: str) -> None:
    messages = [("user", "hi"), ("assistant", "yes"), ("tool", "42")]
    response = service.client.tokenize(echo, messages=messages)
    assert response.text == "<user>hi\n<assistant>yes\n<tool>42\n<assistant>"
    assert service.client.detokenize(echo, response.token_ids) == response.text
    chat = pb.Chat(
        messages=[pb.ChatMessage(role=pb.ROLE_USER, content="hi")], add_generation_prompt=False
    )
    closed = service.generation.Tokenize(pb.TokenizeRequest(model=echo, chat=chat), timeout=30)
    assert closed.text == "<user>hi\n"


def test_tokenizing_needs_no_live_model(service: Any) -> None:
    name = service.import_scripted("asleep")
    ids = service.client.tokenize(name, "abc").token_ids
    assert service.client.detokenize(name, ids) == "abc"
    with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED") as refusal:
        service.generate(name, "abc")
    assert refusal.error.metadata["model"] == name


# Refusals


def not_offered() -> list[Any]:
    """Return a call of each part of the API that belongs to later work."""
    text = {"model": "echo", "text": "x"}
    choice = pb.Choice(options=["a"])
    requests: list[tuple[str, str, Any]] = [
        ("generation", "Generate", pb.GenerateRequest(**text, constraint={kind: value}))
        for kind, value in (
            ("json_schema", "{}"),
            ("regex", "a*"),
            ("grammar", "a"),
            ("choice", choice),
        )
    ]
    return [pytest.param(*one, id=f"{index}-{one[1]}") for index, one in enumerate(requests)]


@pytest.mark.parametrize(("stub", "method", "request_"), not_offered())
def test_what_is_not_offered_yet_says_so(
    service: Any, echo: str, stub: str, method: str, request_: Any
) -> None:
    with service.refused(StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED") as refusal:
        answer = getattr(getattr(service, stub), method)(request_, timeout=30)
        if method == "Generate":
            list(answer)
    assert "not offered" in refusal.error.message


def test_the_next_request_beyond_the_bound_is_refused_at_once(
    service: Any, echo: str, silent: str, eventually: Callable[..., Any]
) -> None:
    def admitted() -> int:
        with service.once.watch_runtime(0.1) as snapshots:
            return next(snapshots).admitted_requests

    eventually(lambda: admitted() == 0)
    streams = [service.stream(silent, "hello") for _ in range(4)]
    eventually(lambda: admitted() == 4)
    with service.refused(StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL") as refusal:
        service.generate(echo, "hello")
    assert refusal.error.retry_after_s is not None
    assert 0 < refusal.error.retry_after_s <= 5
    for stream in streams:
        stream.cancel()
    eventually(lambda: admitted() == 0)
    assert text_of(service.generate(echo, "free", stopping={"max_tokens": 4})) == "free"


def test_a_model_that_nobody_knows(service: Any) -> None:
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND") as refusal:
        service.generate("nobody", "hello")
    assert refusal.error.metadata["model"] == "nobody"


def test_a_model_that_is_loading_is_worth_another_try(
    service: Any, eventually: Callable[..., Any]
) -> None:
    name = service.import_scripted("loading", load_ms=60_000)
    with service.client.load(name) as load:
        next(load)
        with service.refused(StatusCode.UNAVAILABLE, "MODEL_LOADING") as refusal:
            service.generate(name, "hello")
        assert refusal.error.retry_after_s is not None
        assert refusal.error.retry_after_s > 0


# Logs


def test_a_request_is_logged_with_its_numbers(
    service: Any, echo: str, eventually: Callable[..., Any]
) -> None:
    service.generate(echo, "hello", stopping={"max_tokens": 9}, request_id="logged-1")

    def line() -> dict[str, Any] | None:
        lines = [
            one
            for one in service.server.log()
            if one.get("request_id") == "logged-1" and one["event"] == "rpc"
        ]
        return lines[0] if lines else None

    found = eventually(line)
    assert found["method"] == "/lowbit.v1.GenerationService/Generate"
    assert (found["model"], found["worker"], found["code"]) == (echo, "cpu/0", "OK")
    assert (found["prompt_tokens"], found["output_tokens"]) == (5, 9)
    assert 0 < found["queue_ms"] <= found["ttft_ms"] <= found["ms"]


def test_no_prompt_and_no_output_is_ever_logged(
    service: Any, echo: str, eventually: Callable[..., Any]
) -> None:
    marker = "sEcReT-marker"
    service.generate(echo, marker, stopping={"max_tokens": 30})
    service.client.tokenize(echo, marker)
    service.client.generate(echo, messages=[("user", marker)], max_tokens=50).text()
    service.generate(echo, f"a {marker}", stopping={"strings": [marker]})
    stream = service.stream(echo, marker, stopping={"max_tokens": 400})
    next(stream)
    stream.cancel()
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        service.generate(echo, marker, stopping={"max_tokens": 0, "strings": [marker * 200]})
    with service.refused(StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED"):
        service.generate(echo, marker * 100)
    with service.refused(StatusCode.UNIMPLEMENTED, "NOT_IMPLEMENTED"):
        service.generate(echo, marker, constraint={"regex": marker})
    faults = [{"kind": "error", "after_tokens": 15}]
    failing = service.load_scripted("failing", step_ms=1, faults=faults)
    with service.refused(StatusCode.INTERNAL, "INTERNAL"):
        service.generate(failing, marker, request_id="the-last")
    eventually(
        lambda: any(
            one["event"] == "rpc" and one.get("request_id") == "the-last"
            for one in service.server.log()
        )
    )
    assert "the-last" in service.server.log_file.read_text()
    assert marker not in service.server.log_file.read_text()


def test_an_engine_that_fails_says_what_was_used(service: Any) -> None:
    faults = [{"kind": "error", "after_tokens": 3}]
    name = service.load_scripted("fails-late", step_ms=1, faults=faults)
    stream = service.stream(name, "hello")
    events: list[pb.GenerateResponse] = []
    with service.refused(StatusCode.INTERNAL, "INTERNAL") as refusal:
        events.extend(stream)
    assert refusal.error.metadata["prompt_tokens"] == "5"
    assert refusal.error.metadata["output_tokens"] == "3"
