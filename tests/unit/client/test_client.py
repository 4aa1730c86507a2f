"""Every verb reaches its RPC, with what it was given, and returns its answer."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest

from lowbit import AsyncClient, Client, ClientOptions, ResourceExhaustedError, scheme
from lowbit.options import USER_AGENT
from lowbit.v1 import generation_pb2 as generation
from lowbit.v1 import job_pb2 as job
from lowbit.v1 import model_pb2 as model
from lowbit.v1 import quantization_pb2 as quantization
from lowbit.v1 import runtime_pb2 as runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from tests.unit.client.fake import FakeServer

J, M = job.Job(id="j"), model.Model(name="m")
EVALUATION = quantization.Evaluation(max_tokens=64)
RUNTIME = runtime.WatchRuntimeResponse(running_jobs=3)

# RPC, the verb's call, the server's answer, what the verb returns, fields of the request.
VERBS: list[tuple[str, Callable[[Any], Any], Message, Any, dict[str, Any]]] = [
    (
        "Tokenize",
        lambda c: c.tokenize("m", "text", add_special_tokens=False),
        generation.TokenizeResponse(token_ids=[1, 2]),
        generation.TokenizeResponse(token_ids=[1, 2]),
        {"model": "m", "text": "text", "add_special_tokens": False},
    ),
    (
        "Detokenize",
        lambda c: c.detokenize("m", [1, 2], skip_special_tokens=False),
        generation.DetokenizeResponse(text="ab"),
        "ab",
        {"model": "m", "token_ids": [1, 2], "skip_special_tokens": False},
    ),
    (
        "Score",
        lambda c: c.score("m", "p", continuations=[[1], [2, 3]]),
        generation.ScoreResponse(scores=[generation.ContinuationScore(logprob=-1)]),
        generation.ScoreResponse(scores=[generation.ContinuationScore(logprob=-1)]),
        {
            "text": "p",
            "continuations": [generation.TokenIds(ids=[1]), generation.TokenIds(ids=[2, 3])],
        },
    ),
    (
        "ImportModel",
        lambda c: c.import_model("m", path="/x", type="bf16", request_id="r"),
        model.ImportModelResponse(job=J),
        J,
        {
            "model": "m",
            "source": model.ModelSource(path="/x"),
            "type": quantization.FLOAT_TYPE_BF16,
            "request_id": "r",
        },
    ),
    (
        "ImportModel",
        lambda c: c.import_model("m", hub_id="o/n", validate_only=True),
        model.ImportModelResponse(job=J),
        J,
        {"source": model.ModelSource(hub_id="o/n"), "validate_only": True, "request_id": ""},
    ),
    ("GetModel", lambda c: c.get_model("m"), model.GetModelResponse(model=M), M, {"model": "m"}),
    ("DeleteModel", lambda c: c.delete_model("m"), model.DeleteModelResponse(), None, {}),
    (
        "VerifyModel",
        lambda c: c.verify_model("m"),
        model.VerifyModelResponse(files=2),
        model.VerifyModelResponse(files=2),
        {"model": "m"},
    ),
    (
        "SetAlias",
        lambda c: c.set_alias("a", "m"),
        model.SetAliasResponse(),
        None,
        {"alias": "a", "model": "m"},
    ),
    (
        "Unload",
        lambda c: c.unload("m", drain_timeout=0, force=True),
        model.UnloadResponse(replicas=1),
        model.UnloadResponse(replicas=1),
        {"model": "m", "force": True},
    ),
    (
        "Quantize",
        lambda c: c.quantize(
            "a", "b", scheme("nf4", double_quant=False), evaluation=EVALUATION, device="cpu"
        ),
        quantization.QuantizeResponse(job=J),
        J,
        {
            "source": "a",
            "target": "b",
            "scheme": scheme("nf4", double_quant=False),
            "evaluation": EVALUATION,
            "device": "cpu",
        },
    ),
    (
        "ListSchemes",
        lambda c: c.list_schemes(),
        quantization.ListSchemesResponse(schemes=[quantization.SchemeInfo(name="nf4")]),
        [quantization.SchemeInfo(name="nf4")],
        {},
    ),
    (
        "EstimateQuantization",
        lambda c: c.estimate_quantization("a", "int8"),
        quantization.EstimateQuantizationResponse(disk_bytes=7),
        quantization.EstimateQuantizationResponse(disk_bytes=7),
        {"source": "a", "scheme": scheme("int8")},
    ),
    (
        "Evaluate",
        lambda c: c.evaluate("m", against="b", evaluation=EVALUATION),
        quantization.EvaluateResponse(job=J),
        J,
        {"model": "m", "against": "b", "evaluation": EVALUATION},
    ),
    ("ResumeJob", lambda c: c.resume_job("j"), job.ResumeJobResponse(job=J), J, {"id": "j"}),
    ("DeleteJob", lambda c: c.delete_job("j"), job.DeleteJobResponse(), None, {"id": "j"}),
    (
        "ListDevices",
        lambda c: c.devices(),
        runtime.ListDevicesResponse(devices=[runtime.Device(name="cpu")]),
        [runtime.Device(name="cpu")],
        {},
    ),
    (
        "GetServerInfo",
        lambda c: c.info(),
        runtime.GetServerInfoResponse(version="1"),
        runtime.GetServerInfoResponse(version="1"),
        {},
    ),
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
async def test_verb(server: FakeServer, client: Client, aclient: AsyncClient, verb: Any) -> None:
    method, call, answer, result, fields = verb
    server.on[method] = lambda *_: answer
    assert call(client) == result
    assert await call(aclient) == result
    for request in server.requests(method):
        assert {name: getattr(request, name) for name in fields} == fields
    assert len(server.seen) == 2


def test_both_clients_have_the_same_verbs(client: Client) -> None:
    def verbs(made: object) -> dict[str, list[str]]:
        found = {name: getattr(made, name) for name in vars(made) if not name.startswith("_")}
        return {name: list(inspect.signature(verb).parameters) for name, verb in found.items()}

    async def other() -> dict[str, list[str]]:
        async with AsyncClient(client.address) as made:
            return verbs(made)

    assert verbs(client) == asyncio.run(other())
    assert len(verbs(client)) == 28
    words = (Client.__doc__ or "").replace(",", " ").replace(".", " ").split()
    assert set(verbs(client)) <= set(words)


def test_loading_gives_progress_and_waits(server: FakeServer, client: Client) -> None:
    steps = [
        model.LoadResponse(worker="cpu/0", phase=model.LOAD_PHASE_READ, fraction=0.5),
        model.LoadResponse(worker="cpu/1", phase=model.LOAD_PHASE_LIVE, live_bytes=8),
        model.LoadResponse(worker="cpu/0", phase=model.LOAD_PHASE_LIVE, live_bytes=7),
    ]
    server.on["Load"] = lambda *_: iter(steps)
    assert list(client.load("m", "cpu", 2)) == steps
    assert client.load("m", "cpu", 2).wait() == [steps[2], steps[1]]
    assert server.requests("Load")[0] == model.LoadRequest(model="m", device="cpu", replicas=2)


async def test_watching_models_and_the_runtime(server: FakeServer, aclient: AsyncClient) -> None:
    changes = [model.WatchModelResponse(model=M)] * 2
    server.on["WatchModel"] = lambda *_: iter(changes)
    server.on["WatchRuntime"] = lambda *_: iter([RUNTIME])
    assert [item async for item in aclient.watch_model("m")] == changes
    assert [item async for item in aclient.watch_runtime(0.5)] == [RUNTIME]
    assert server.requests("WatchRuntime")[0].interval.ToMilliseconds() == 500


def pages(request: model.ListModelsRequest, _: object) -> model.ListModelsResponse:
    if request.page_token:
        return model.ListModelsResponse(models=[model.Model(name="b")])
    return model.ListModelsResponse(models=[model.Model(name="a")], next_page_token="more")


async def test_all_models_are_listed(
    server: FakeServer, client: Client, aclient: AsyncClient
) -> None:
    server.on["ListModels"] = pages
    assert [item.name for item in client.models()] == ["a", "b"]
    assert [item.name async for item in aclient.models()] == ["a", "b"]


def test_the_server_is_told_who_calls(server: FakeServer, client: Client) -> None:
    server.on["GetServerInfo"] = lambda *_: runtime.GetServerInfoResponse()
    client.info()
    agent = str(server.seen[0].metadata["user-agent"])
    assert agent.startswith(USER_AGENT + " ")
    assert USER_AGENT.startswith("lowbit-python/")


def test_a_large_answer_fits_and_a_larger_one_does_not(server: FakeServer) -> None:
    server.on["Detokenize"] = lambda *_: generation.DetokenizeResponse(text="x" * 5_000_000)
    with Client(server.address) as client:
        assert len(client.detokenize("m", [1])) == 5_000_000
    small = ClientOptions(max_message_bytes=1_000_000)
    with (
        Client(server.address, small) as client,
        pytest.raises(ResourceExhaustedError, match="larger than max"),
    ):
        client.detokenize("m", [1])
