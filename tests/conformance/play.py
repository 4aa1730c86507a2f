"""Plays the steps of a scenario and compares what is seen with what is expected."""

from __future__ import annotations

import itertools
import re
import time
import tomllib
from functools import cache
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from lowbit.v1 import (
    generation_pb2,
    job_pb2,
    model_pb2,
    quantization_pb2,
    runtime_pb2,
)
from lowbit_server.errors import CODES, Reason
from tests.conformance.schema import ROOT, plain
from tests.conformance.stage import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

    from tests.conformance.stage import Stage
    from tests.conformance.testee import Testee

SECRET = "xyzzy"
"""Prompts hold this word; no error and no log may."""

MESSAGES: dict[str, type[Message]] = {
    "detokenize": generation_pb2.DetokenizeResponse,
    "tokenize": generation_pb2.TokenizeResponse,
    "score": generation_pb2.ScoreResponse,
    **dict.fromkeys(
        ("import_model", "quantize", "evaluate", "jobs", "get_job", "cancel_job", "resume_job"),
        job_pb2.Job,
    ),
    "wait_job": job_pb2.Job,
    "watch_job": job_pb2.WatchJobResponse,
    **dict.fromkeys(("models", "get_model"), model_pb2.Model),
    "verify_model": model_pb2.VerifyModelResponse,
    "estimate_load": model_pb2.EstimateLoadResponse,
    "load": model_pb2.LoadResponse,
    "unload": model_pb2.UnloadResponse,
    "watch_model": model_pb2.WatchModelResponse,
    "watch_runtime": runtime_pb2.WatchRuntimeResponse,
    "list_schemes": quantization_pb2.SchemeInfo,
    "estimate_quantization": quantization_pb2.EstimateQuantizationResponse,
    "devices": runtime_pb2.Device,
    "info": runtime_pb2.GetServerInfoResponse,
}
"""Type of the `message` events of each verb; see client/README.md."""

_ids = itertools.count(1)


class Mismatch(Exception):  # noqa: N818 - it reads better where it is caught
    """What was seen is not what the scenario expects."""


@cache
def _classes() -> dict[str, str]:
    """Return the class of each reason, from client/contract.toml."""
    table = tomllib.loads((ROOT / "client" / "contract.toml").read_text())
    return {
        reason: f"{error['name']}Error"
        for error in table["errors"]
        for reason in error.get("reasons", ())
    }


def variants(scenario: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield name and replacements of each play of a scenario."""
    if not scenario.each_reason:
        yield scenario.name, {}
        return
    for reason in Reason:
        code = CODES[reason].name
        known = {"$reason": reason.value, "$code": code, "$class": _classes()[reason]}
        yield f"{scenario.name} {reason}", known


class Play:
    """One play of one scenario."""

    def __init__(self, stage: Stage, testee: Testee, replaced: dict[str, str]) -> None:
        """Play against a stage; `replaced` are words that stand for others."""
        self._stage = stage
        self._testee = testee
        self._replaced = replaced
        self._calls: dict[str, tuple[int, Any, float]] = {}

    def run(self, steps: Any) -> None:
        """Play all steps; raise Mismatch, TesteeError or TimeoutError."""
        for step in steps:
            kind = step.WhichOneof("kind")
            getattr(self, f"_{kind}")(getattr(step, kind))
        for name in self._calls:
            self._check_secret(name)

    # Steps

    def _call(self, call: Any) -> None:
        id_ = next(_ids)
        target = self._stage.proxy.address if call.proxied else self._stage.address
        target = call.target or target
        line: dict[str, Any] = {"id": id_, "target": target, "verb": call.verb}
        for name in ("request", "options"):
            if value := self._filled(plain(getattr(call, name))):
                line[name] = value
        if call.HasField("timeout_s"):
            line["timeout_s"] = plain(call.timeout_s)
        for name in ("cancel_after", "drop_after"):
            if count := getattr(call, name):
                line[name] = count
        self._calls[call.name or "it"] = (id_, call, time.monotonic())
        self._testee.send(line)

    def _seen(self, seen: Any) -> None:
        id_, _, _ = self._calls[seen.call or "it"]
        count = seen.count or 1

        def reached(events: list[dict[str, Any]]) -> bool:
            return sum(event["event"] == seen.event for event in events) >= count

        self._testee.wait(id_, reached, f"{count} {seen.event}")

    def _cancel(self, name: str) -> None:
        self._testee.send({"id": self._calls[name][0], "cancel": True})

    def _action(self, action: int) -> None:
        names = ("", "kill_worker", "drain", "restart", "break_connections")
        getattr(self._stage, (*names, "freeze_job", "thaw_job", "replace")[action])()

    def _pause_s(self, seconds: float) -> None:
        time.sleep(seconds)  # what a scenario waits for here shows nowhere

    def _running(self, running: Any) -> None:
        count = running.requests
        until(lambda: self._stage.running() == count, f"{count} running requests")

    def _logged(self, logged: Any) -> None:
        lines = self._stage.log(logged.request_id)
        wanted = logged.at_least or logged.calls or 1
        until(lambda: len(self._stage.log(logged.request_id)) >= wanted, f"{wanted} logged calls")
        lines = self._stage.log(logged.request_id)
        if not logged.at_least:
            _same("logged calls", len(lines), wanted)
        for field, pattern in logged.fields.items():
            text = str(lines[-1].get(field))
            language = self._testee.language.partition("-")[0]
            if not re.search(pattern.replace("$lang", language), text):
                raise Mismatch(f"logged {field} is {text!r}, not {pattern!r}")

    def _expect(self, expected: Any) -> None:
        name = expected.call or "it"
        id_, call, began = self._calls[name]
        events = self._testee.last(id_)
        seconds = time.monotonic() - began
        if not expected.HasField("failure") and events[-1]["event"] == "error":
            raise Mismatch(f"call {name!r} failed: {events[-1]}")
        if expected.events:
            _same(
                "events", [kind for kind, _ in itertools.groupby(_kinds(events))], expected.events
            )
        if call.verb == "generate":
            _expect_text(expected, events)
        else:
            self._expect_messages(expected, call.verb, events)
        if expected.HasField("failure"):
            self._expect_failure(expected.failure, events[-1])
        if expected.within_s and seconds > expected.within_s:
            raise Mismatch(f"it took {seconds:.2f} s, not at most {expected.within_s:g}")
        if seconds < expected.at_least_s:
            raise Mismatch(f"it took {seconds:.2f} s, not at least {expected.at_least_s:g}")

    def _expect_messages(self, expected: Any, verb: str, events: list[dict[str, Any]]) -> None:
        messages = [
            _parsed(event["message"], MESSAGES[verb])
            for event in events
            if event["event"] == "message"
        ]
        if expected.messages:
            _same("number of messages", len(messages), expected.messages)
        for kind, index in (("first", 0), ("last", -1)):
            if expected.HasField(kind):
                if not messages:
                    raise Mismatch("there is no message")
                _has(
                    f"{kind} message", messages[index], self._filled(plain(getattr(expected, kind)))
                )
        if expected.counts:
            numbers = [int(one[expected.counts]) for one in messages]
            _same(expected.counts, numbers, list(range(1, len(numbers) + 1)))

    def _expect_failure(self, failure: Any, event: dict[str, Any]) -> None:
        _same("last event", event["event"], "error")
        for field in ("class", "code", "reason"):
            _same(f"{field} of {event}", event[field], self._word(getattr(failure, field)))
        for key, value in failure.metadata.items():
            _has(f"metadata {key}", event["metadata"].get(key), self._word(value))
        _same(
            "violations",
            sorted(one["field"] for one in event["violations"]),
            sorted(failure.violations),
        )
        wanted = failure.retry_after_s if failure.HasField("retry_after_s") else None
        _same("retry_after_s", event["retry_after_s"], wanted)
        if failure.HasField("partial_text"):
            _same("partial text", event.get("partial_text"), failure.partial_text)
        if failure.request_id:
            _same("request id", event["request_id"], failure.request_id)
        if not re.search(failure.message, event["message"]):
            raise Mismatch(f"message is {event['message']!r}, not {failure.message!r}")

    # Words

    def _word(self, text: str) -> str:
        return self._replaced.get(text, text)

    def _filled(self, value: Any) -> Any:
        """Return a request with what stands for something else replaced."""
        if isinstance(value, dict):
            return {key: self._filled(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._filled(one) for one in value]
        if not isinstance(value, str) or not value.startswith("$"):
            return value
        kind, _, name = value.partition(":")
        if kind == "$source":
            return self._stage.source(name)
        if kind == "$weights":
            return self._stage.weights(name)
        if kind == "$job":
            id_, _, _ = self._calls[name]
            events = self._testee.wait(id_, len, "job")
            if events[0]["event"] != "message":
                raise Mismatch(f"call {name!r} gave no job: {events[0]}")
            return str(events[0]["message"]["id"])
        return self._replaced.get(value) or str(self._stage.files[value[1:]])

    def _check_secret(self, name: str) -> None:
        for event in self._testee.events(self._calls[name][0]):
            shown = {key: one for key, one in event.items() if key != "partial_text"}
            if event["event"] == "error" and SECRET in str(shown):
                raise Mismatch(f"the error holds text of the prompt: {event}")
        if SECRET in self._testee.stderr():
            raise Mismatch("standard error holds text of the prompt")


def _expect_text(expected: Any, events: list[dict[str, Any]]) -> None:
    deltas = [event for event in events if event["event"] == "delta"]
    if expected.HasField("text"):
        wanted = plain(expected.text)
        _same("text", "".join(one["text"] for one in deltas), wanted)
    if len(deltas) < expected.min_deltas:
        raise Mismatch(f"{len(deltas)} deltas, not {expected.min_deltas} or more")
    if expected.token_ids:
        _same("token ids", [id_ for one in deltas for id_ in one["token_ids"]], expected.token_ids)
    if expected.logprobs:
        found = [round(logprob, 4) for one in deltas for logprob in one["logprobs"]]
        _same("log-probabilities", found, list(expected.logprobs))
    for kind, type_ in (
        ("started", generation_pb2.Started),
        ("finished", generation_pb2.OutputFinished),
        ("completed", generation_pb2.Completed),
    ):
        if expected.HasField(kind):
            _has(kind, _parsed(_only(events, kind), type_), plain(getattr(expected, kind)))


def _kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def _only(events: list[dict[str, Any]], kind: str) -> Any:
    found = [event["message"] for event in events if event["event"] == kind]
    if len(found) != 1:
        raise Mismatch(f"{len(found)} events {kind!r}, not one")
    return found[0]


def _parsed(message: Any, type_: type[Message]) -> dict[str, Any]:
    """Return proto JSON of any dialect with original names and all defaults."""
    try:
        parsed = json_format.ParseDict(message, type_())
    except json_format.ParseError as error:
        raise Mismatch(f"{message} is no {type_.DESCRIPTOR.name}: {error}") from error
    return json_format.MessageToDict(
        parsed, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _same(what: str, seen: Any, wanted: Any) -> None:
    wanted = wanted if isinstance(wanted, str | int | float | None) else list(wanted)
    if seen != wanted:
        raise Mismatch(f"{what}: {str(seen)[:2000]!r}, not {str(wanted)[:2000]!r}")


def _has(where: str, seen: Any, wanted: Any) -> None:
    """Compare what is named; "*" is anything but nothing, zero or an empty text."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            _has(f"{where}.{key}", seen.get(key) if isinstance(seen, dict) else seen, value)
    elif isinstance(wanted, list):
        _same(f"length of {where}", len(seen or ()), len(wanted))
        for index, value in enumerate(wanted):
            _has(f"{where}[{index}]", seen[index], value)
    elif wanted == "*":
        if seen in (None, "", 0, "0", [], {}):
            raise Mismatch(f"{where} is {seen!r}")
    else:
        # 64-bit numbers are strings in proto JSON.
        _same(where, str(seen), str(wanted))
