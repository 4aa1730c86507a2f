"""The testee of the Python SDK; tests/conformance/README.md has its protocol."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from lowbit import Client, ClientOptions, GenerateStream, LowbitError, TlsOptions
from lowbit.v1 import generation_pb2, job_pb2, model_pb2, quantization_pb2, runtime_pb2

_writing = threading.Lock()
_kept: list[Client] = []
"""Clients of calls that were dropped."""


def write(id_: int, event: str, **keys: Any) -> None:
    """Write one event."""
    line = json.dumps({"id": id_, "event": event, **keys}, ensure_ascii=False)
    with _writing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def to_json(message: Message) -> dict[str, Any]:
    """Return a message as proto JSON."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def given(message: Message, *fields: str) -> dict[str, Any]:
    """Return the fields of a message that are set, as arguments of a verb."""
    present = {field.name for field, _ in message.ListFields()}
    return {name: getattr(message, name) for name in fields if name in present}


def seconds(message: Message, field: str) -> dict[str, float]:
    """Return a duration as an argument in seconds."""
    found = getattr(message, field)
    return {field: found.ToNanoseconds() / 1e9} if message.HasField(field) else {}


def generate(client: Client, request: Any, timeout: float | None) -> Any:
    """Start a generation from its request."""
    stopping, sampling = request.stopping, request.sampling
    options = given(stopping, "max_tokens", "min_tokens", "ignore_eos")
    options |= seconds(stopping, "time_limit")
    options |= given(sampling, *(field.name for field in sampling.DESCRIPTOR.fields))
    if request.output.HasField("token_ids"):
        options["token_ids_output"] = request.output.token_ids
    if request.output.HasField("logprobs"):
        options["logprobs"] = request.output.logprobs
    options |= given(request, "deterministic", "prompt_lookup_tokens", "cache_salt")
    options |= given(request.constraint, "json_schema", "regex", "grammar")
    if request.constraint.HasField("choice"):
        options["choice"] = request.constraint.choice.options
    match request.WhichOneof("input"):
        case "chat":
            options["messages"] = request.chat.messages
        case "token_ids":
            options["token_ids"] = request.token_ids.ids
        case _:
            options["prompt"] = request.text
    return client.generate(
        request.model,
        **options,
        stop=stopping.strings,
        stop_token_ids=stopping.token_ids,
        request_id=request.request_id,
        timeout=timeout,
    )


def text_or_chat(request: Any) -> dict[str, Any]:
    """Return the input of a tokenize request as an argument."""
    if request.WhichOneof("input") == "chat":
        return {"messages": request.chat.messages}
    return {"text": request.text}


def scoring(client: Client, request: Any, timeout: float | None) -> Any:
    """Score continuations from their request."""
    chosen = request.WhichOneof("prompt")
    prompt = {"prompt": request.text} if chosen == "text" else {"token_ids": request.token_ids.ids}
    ids = [one.ids for one in request.continuations]
    salt = given(request, "cache_salt")
    return client.score(request.model, **prompt, **salt, continuations=ids, timeout=timeout)


JOB = ("device", "calibration", "evaluation", "skip_evaluation", "gate", "request_id")
Verb = tuple[type[Message], Callable[[Client, Any, float | None], Any]]
VERBS: dict[str, Verb] = {
    "generate": (generation_pb2.GenerateRequest, generate),
    "tokenize": (
        generation_pb2.TokenizeRequest,
        lambda client, it, timeout: client.tokenize(it.model, **text_or_chat(it), timeout=timeout),
    ),
    "detokenize": (
        generation_pb2.DetokenizeRequest,
        lambda client, it, timeout: generation_pb2.DetokenizeResponse(
            text=client.detokenize(it.model, it.token_ids, timeout=timeout)
        ),
    ),
    "score": (generation_pb2.ScoreRequest, scoring),
    "import_model": (
        model_pb2.ImportModelRequest,
        lambda client, it, timeout: client.import_model(
            it.model,
            **given(it.source, "path", "hub_id"),
            **given(it, "request_id", "validate_only"),
            timeout=timeout,
        ),
    ),
    "quantize": (
        quantization_pb2.QuantizeRequest,
        lambda client, it, timeout: client.quantize(
            it.source, it.target, it.scheme, **given(it, *JOB, "validate_only"), timeout=timeout
        ),
    ),
    "evaluate": (
        quantization_pb2.EvaluateRequest,
        lambda client, it, timeout: client.evaluate(
            it.model, **given(it, "against", "evaluation", "device", "request_id"), timeout=timeout
        ),
    ),
    "models": (
        model_pb2.ListModelsRequest,
        lambda client, it, _: client.models(**given(it, "page_size")),
    ),
    "jobs": (
        job_pb2.ListJobsRequest,
        lambda client, it, _: client.jobs(it.states, **given(it, "page_size")),
    ),
    "get_model": (
        model_pb2.GetModelRequest,
        lambda client, it, timeout: client.get_model(it.model, timeout=timeout),
    ),
    "delete_model": (
        model_pb2.DeleteModelRequest,
        lambda client, it, timeout: client.delete_model(it.model, timeout=timeout),
    ),
    "verify_model": (
        model_pb2.VerifyModelRequest,
        lambda client, it, timeout: client.verify_model(it.model, timeout=timeout),
    ),
    "estimate_load": (
        model_pb2.EstimateLoadRequest,
        lambda client, it, timeout: client.estimate_load(it.model, timeout=timeout),
    ),
    "set_alias": (
        model_pb2.SetAliasRequest,
        lambda client, it, timeout: client.set_alias(it.alias, it.model, timeout=timeout),
    ),
    "load": (
        model_pb2.LoadRequest,
        lambda client, it, timeout: client.load(
            it.model, **given(it, "device", "replicas"), timeout=timeout
        ),
    ),
    "unload": (
        model_pb2.UnloadRequest,
        lambda client, it, _: client.unload(
            it.model, **seconds(it, "drain_timeout"), force=it.force
        ),
    ),
    "watch_model": (
        model_pb2.WatchModelRequest,
        lambda client, it, _: client.watch_model(it.model),
    ),
    "list_schemes": (
        quantization_pb2.ListSchemesRequest,
        lambda client, _, timeout: client.list_schemes(timeout=timeout),
    ),
    "estimate_quantization": (
        quantization_pb2.EstimateQuantizationRequest,
        lambda client, it, timeout: client.estimate_quantization(
            it.source, it.scheme, timeout=timeout
        ),
    ),
    "get_job": (
        job_pb2.GetJobRequest,
        lambda client, it, timeout: client.get_job(it.id, timeout=timeout),
    ),
    "watch_job": (
        job_pb2.WatchJobRequest,
        lambda client, it, _: client.watch_job(it.id, it.after_sequence),
    ),
    "wait_job": (job_pb2.WatchJobRequest, lambda client, it, _: client.wait_job(it.id)),
    "cancel_job": (
        job_pb2.CancelJobRequest,
        lambda client, it, timeout: client.cancel_job(it.id, timeout=timeout),
    ),
    "resume_job": (
        job_pb2.ResumeJobRequest,
        lambda client, it, timeout: client.resume_job(it.id, timeout=timeout),
    ),
    "delete_job": (
        job_pb2.DeleteJobRequest,
        lambda client, it, timeout: client.delete_job(it.id, timeout=timeout),
    ),
    "devices": (
        runtime_pb2.ListDevicesRequest,
        lambda client, _, timeout: client.devices(timeout=timeout),
    ),
    "info": (
        runtime_pb2.GetServerInfoRequest,
        lambda client, _, timeout: client.info(timeout=timeout),
    ),
    "watch_runtime": (
        runtime_pb2.WatchRuntimeRequest,
        lambda client, it, _: client.watch_runtime(**seconds(it, "interval")),
    ),
}


class Running:
    """One call; `cancel` may come from the thread that reads the lines."""

    def __init__(self, line: dict[str, Any]) -> None:
        """Take a line."""
        self._id = line.pop("id")
        self._target = line.pop("target")
        type_, self._verb = VERBS[line.pop("verb")]
        self._request = json_format.ParseDict(line.pop("request", {}), type_())
        self._options = line.pop("options", {})
        self._timeout = line.pop("timeout_s", None)
        self._cancel_after = line.pop("cancel_after", 0)
        self._drop_after = line.pop("drop_after", 0)
        if line:
            raise ValueError(f"unknown keys: {', '.join(line)}")
        self._stream: Any = None
        self._cancelled = False
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def cancel(self) -> None:
        """Cancel the stream, or have it cancelled as soon as there is one."""
        with self._lock:
            self._cancelled = True
            if self._stream is not None:
                self._stream.cancel()

    def run(self) -> None:
        """Make the call and write its events."""
        try:
            client = Client(self._target, options_of(self._options))
        except ValueError as error:
            empty = {"code": "", "reason": "", "metadata": {}, "violations": []}
            empty |= {"retry_after_s": None, "request_id": ""}
            write(self._id, "error", **empty, **{"class": "ValueError", "message": str(error)})
            return
        try:
            if self._read(client):
                self._tell_facts()
                write(self._id, "end")
            else:
                _kept.append(client)  # closing it would do what the drop has to do
                self._stream = None
                write(self._id, "dropped")
                return
        except LowbitError as error:
            self._tell_facts()
            text = self._stream.partial_text if isinstance(self._stream, GenerateStream) else ""
            write(self._id, "error", **described(error), partial_text=text)
        client.close()

    def _read(self, client: Client) -> bool:
        """Make the call and give all that it returns; return False when it is dropped."""
        result = self._verb(client, self._request, self._timeout)
        if hasattr(result, "cancel"):
            with self._lock:
                self._stream = result
            if self._cancelled:
                result.cancel()
        for count, item in enumerate([result] if isinstance(result, Message) else result or (), 1):
            self._give(item)
            if count == self._cancel_after:
                result.cancel()
            if count == self._drop_after:
                return False
        return True

    def _give(self, item: Any) -> None:
        if isinstance(item, Message):
            write(self._id, "message", message=to_json(item))
            return
        self._tell("started")
        lists = {"token_ids": item.token_ids, "logprobs": item.logprobs}
        write(self._id, "delta", text=item.text, output_index=item.output_index, **lists)

    def _tell_facts(self) -> None:
        for name in ("started", "finished", "completed"):
            self._tell(name)

    def _tell(self, name: str) -> None:
        """Write a fact of the generation once it is known."""
        message = None
        if isinstance(self._stream, GenerateStream):
            message = (
                completed(self._stream) if name == "completed" else getattr(self._stream, name)
            )
        if message is not None and name not in self._told:
            self._told.add(name)
            write(self._id, name, message=to_json(message))


def completed(stream: GenerateStream) -> generation_pb2.Completed | None:
    """Return usage and timings of a stream that has ended well."""
    if stream.usage is None:
        return None
    return generation_pb2.Completed(usage=stream.usage, timings=stream.timings)


def options_of(line: dict[str, Any]) -> ClientOptions:
    """Return the options of a line."""
    line = dict(line)
    if (traceparent := line.pop("traceparent", None)) is not None:
        line["traceparent"] = lambda: traceparent
    if (tls := line.pop("tls", None)) is not None:
        files = {key: tls.pop(f"{key}_file", None) for key in ("ca", "certificate", "key")}
        pems = {key: Path(file).read_bytes() for key, file in files.items() if file}
        line["tls"] = TlsOptions(**pems, **tls)
    return ClientOptions(**line)


def described(error: LowbitError) -> dict[str, Any]:
    """Return an error as the keys of its event."""
    return {
        "class": type(error).__name__,
        "code": error.code.name,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "violations": [
            {"field": one.field, "description": one.description} for one in error.violations
        ],
        "retry_after_s": error.retry_after_s,
        "request_id": error.request_id,
    }


def main() -> None:
    """Run calls until the input ends."""
    calls: dict[int, Running] = {}
    for text in sys.stdin:
        line = json.loads(text)
        if line.get("cancel"):
            calls[line["id"]].cancel()
            continue
        id_ = line["id"]
        calls[id_] = Running(line)
        threading.Thread(target=calls[id_].run, name=f"call {id_}", daemon=True).start()


def fail(arguments: threading.ExceptHookArgs) -> None:
    """End at once: a call that died would be waited for."""
    sys.__excepthook__(arguments.exc_type, arguments.exc_value or ValueError(), None)
    os._exit(1)


if __name__ == "__main__":
    threading.excepthook = fail
    main()
