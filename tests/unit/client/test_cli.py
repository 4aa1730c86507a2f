"""The command against a fake server: what it prints, where, and its exit codes."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from lowbit.v1 import model_pb2 as model
from lowbit.v1 import quality_pb2
from lowbit.v1 import quantization_pb2 as quantization
from lowbit.v1 import runtime_pb2 as runtime
from lowbit.v1.errors_pb2 import ERROR_REASON_DISK_FULL
from lowbit.v1.job_pb2 import (
    JOB_KIND_QUANTIZE,
    JOB_PHASE_QUANTIZE,
    JOB_STATE_CANCELLED,
    JOB_STATE_FAILED,
    JOB_STATE_PAUSED,
    JOB_STATE_QUEUED,
    JOB_STATE_RUNNING,
    JOB_STATE_SUCCEEDED,
    CancelJobResponse,
    GetJobResponse,
    Job,
    JobError,
    JobProgress,
    JobState,
    ListJobsResponse,
    ResumeJobResponse,
    WatchJobResponse,
)
from tests.unit.client.fake import refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.unit.client.fake import FakeServer

Run: TypeAlias = "Callable[..., tuple[int, str, str]]"

MODEL = model.Model(
    name="m",
    scheme="nf4",
    parameters=135_000_000,
    context_tokens=8192,
    disk_bytes=2**20,
    quality=quality_pb2.QualityReport(perplexity=17.79),
    replicas=[model.Replica(worker="cpu/0", state=model.REPLICA_STATE_LIVE)],
)
JOB = Job(
    id="j1",
    kind=JOB_KIND_QUANTIZE,
    state=JOB_STATE_RUNNING,
    model="m",
    progress=JobProgress(phase=JOB_PHASE_QUANTIZE, done=3, total=30),
)


GPTQ = ["quantize", "a", "b", "--scheme", "gptq"]


def job_events(*jobs: Job) -> Callable[..., Iterator[WatchJobResponse]]:
    return lambda *_: iter(
        [WatchJobResponse(sequence=number, job=job) for number, job in enumerate(jobs, 1)]
    )


def test_an_error_is_one_line_with_its_reason(server: FakeServer, run: Run) -> None:
    server.on["GetModel"] = lambda _, context: refuse(
        context, grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", message="no model\nis named x"
    )
    assert run("models", "show", "x") == (
        1,
        "",
        "lowbit: error: MODEL_NOT_FOUND: no model is named x\n",
    )


def test_no_server_is_one_line_too(run: Run) -> None:
    code, out, err = run("info", address="127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("lowbit: error: UNAVAILABLE: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing command"),
        (["no-such"], "no-such"),
        (["generate", "m"], "'prompt'"),
        (["generate", "m", "p", "--top-k", "-1"], "-1"),
        (["generate", "m", "p", "--temperature", "hot"], "'--temperature'"),
        (["quantize", "a", "b", "--scheme", "int3"], "allowed are fp32"),
        (["quantize", "a", "b", "--scheme", "int8", "--double-quant"], "no option double_quant"),
        (["quantize", "a", "b", "--scheme", "auto"], "'auto' needs a budget"),
        (["quantize", "a", "b", "--scheme", "auto", "--budget", "much"], "is no size"),
        ([*GPTQ, "--calibration-text", "a", "--calibration-dataset", "c4"], "not both"),
        ([*GPTQ, "--calibration-field", "text"], "give its path"),
        ([*GPTQ, "--calibration-samples", "-1"], "-1"),
        (["import", "m"], "exactly one"),
        (["import", "m", "/x", "--type", "int8"], "unknown type"),
        (["jobs", "--state", "asleep"], "allowed are queued"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(
    server: FakeServer, run: Run, arguments: list[str], words: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.startswith("lowbit: error: ")
    assert err.count("\n") == 1
    assert server.seen == []


READS: list[tuple[list[str], str, Any, str]] = [
    (["models"], "ListModels", model.ListModelsResponse(models=[MODEL]), "17.79"),
    (["models", "list"], "ListModels", model.ListModelsResponse(models=[MODEL]), "cpu/0 (live)"),
    (["models", "show", "m"], "GetModel", model.GetModelResponse(model=MODEL), "1.0 MiB"),
    (["models", "verify", "m"], "VerifyModel", model.VerifyModelResponse(files=2), "2 files"),
    (
        ["models", "estimate", "m"],
        "EstimateLoad",
        model.EstimateLoadResponse(
            disk_bytes=2**20,
            devices=[
                model.LoadEstimate(
                    device="cpu", live_bytes=2**21, duration=Duration(seconds=6), fits=True
                )
            ],
        ),
        "6 s   yes",
    ),
    (
        ["estimate", "m", "--scheme", "rtn", "--bits", "3"],
        "EstimateQuantization",
        quantization.EstimateQuantizationResponse(
            disk_bytes=2**20,
            devices=[quantization.DeviceEstimate(device="cuda:0", kv_bytes_per_token=2048)],
        ),
        "unknown",
    ),
    (["jobs"], "ListJobs", ListJobsResponse(jobs=[JOB]), "quantize 3/30"),
    (["jobs", "list"], "ListJobs", ListJobsResponse(jobs=[JOB]), "running"),
    (["jobs", "show", "j1"], "GetJob", GetJobResponse(job=JOB), "quantize 3/30"),
    (
        ["devices"],
        "ListDevices",
        runtime.ListDevicesResponse(
            devices=[
                runtime.Device(
                    name="cpu",
                    free_bytes=2**30,
                    total_bytes=2**31,
                    workers=[runtime.Worker(name="cpu/0", state=runtime.WORKER_STATE_READY)],
                )
            ]
        ),
        "1.00 GiB of 2.00 GiB",
    ),
    (
        ["info"],
        "GetServerInfo",
        runtime.GetServerInfoResponse(version="9.9", draining=True),
        "draining",
    ),
    (
        ["schemes"],
        "ListSchemes",
        quantization.ListSchemesResponse(
            schemes=[
                quantization.SchemeInfo(
                    name="nf4",
                    bits_per_weight=4.5,
                    availability=[
                        quantization.SchemeAvailability(
                            device="cpu", can_serve=True, reason="install bitsandbytes"
                        )
                    ],
                )
            ]
        ),
        "serve: install bitsandbytes",
    ),
]


@pytest.mark.parametrize("read", READS, ids=lambda read: " ".join(read[0]))
def test_reading_prints_text_or_one_json_document(
    server: FakeServer, run: Run, read: tuple[list[str], str, Any, str]
) -> None:
    arguments, method, answer, words = read
    server.on[method] = lambda *_: answer
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert words in out
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    names = {field.name for field in answer.DESCRIPTOR.fields}
    if names in ({"model"}, {"job"}):
        names = {field.name for field in answer.DESCRIPTOR.fields[0].message_type.fields}
    assert set(document) <= names
    assert document


def test_show_prints_the_chain(server: FakeServer, run: Run) -> None:
    file = model.ModelFile(path="x.gguf", bytes=2048, sha256="d" * 64)
    base = model.Ancestor(
        name="base",
        scheme="bf16",
        revision="b" * 64,
        source="org/base",
        source_revision="c" * 40,
        source_digest="e" * 64,
        source_files=[file],
    )
    small = model.Model(
        name="small",
        scheme="gptq",
        revision="a" * 64,
        parent="base",
        calibration_digest="f" * 64,
        ancestors=[base],
    )
    server.on["GetModel"] = lambda *_: model.GetModelResponse(model=small)
    _, out, _ = run("models", "show", "small")
    assert out.partition("lineage:\n")[2].splitlines() == [
        f"  small (gptq), revision {'a' * 12}, calibrated with {'f' * 12}",
        f"  base (bf16), revision {'b' * 12}",
        f"  org/base at {'c' * 40}, digest {'e' * 12}",
        f"    x.gguf, 2.0 KiB, {'d' * 12}",
    ]
    small.ClearField("ancestors")  # made by a server that recorded none
    small.source_digest = "b" * 64
    _, out, _ = run("models", "show", "small")
    assert out.endswith(f"  base, revision {'b' * 12}\n")


def test_json_keeps_the_schemas_names(server: FakeServer, run: Run) -> None:
    server.on["ListModels"] = lambda *_: model.ListModelsResponse(models=[MODEL])
    _, out, _ = run("models", "--json")
    (found,) = json.loads(out)["models"]
    assert found["disk_bytes"] == "1048576"
    assert found["aliases"] == []
    assert found["quality"]["perplexity"] == 17.79


def test_quantize_waits_and_says_what_it_made(server: FakeServer, run: Run) -> None:
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=JOB)
    server.on["WatchJob"] = job_events(
        Job(id="j1", state=JOB_STATE_QUEUED, queue_position=2),
        JOB,
        Job(id="j1", state=JOB_STATE_SUCCEEDED),
    )
    server.on["GetModel"] = lambda *_: model.GetModelResponse(model=MODEL)
    code, out, err = run(
        *("quantize", "a", "m", "--scheme", "nf4", "--compute-type", "fp32", "--eval-tokens", "64"),
        *("--no-double-quant", "--device", "cpu", "--request-id", "r"),
    )
    assert (code, out) == (0, "m: nf4, 1.0 MiB, perplexity 17.79\n")
    assert "quantize m" in err
    (request,) = server.requests("Quantize")
    assert request.scheme.bnb_4bit.compute_type == quantization.FLOAT_TYPE_FP32
    assert request.scheme.bnb_4bit.double_quant is False
    assert request.evaluation.max_tokens == 64
    assert (request.device, request.request_id) == ("cpu", "r")


def test_quantize_takes_the_options_of_rtn(server: FakeServer, run: Run) -> None:
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=JOB)
    grid = ("--bits", "3", "--group-size", "-1", "--sym")
    code, out, _ = run("quantize", "a", "m", "--scheme", "rtn", *grid, "--no-wait")
    assert (code, out) == (0, "j1\n")
    (request,) = server.requests("Quantize")
    assert request.scheme == quantization.Scheme(
        rtn=quantization.RtnScheme(bits=3, group_size=-1, sym=True)
    )


@pytest.mark.parametrize(
    ("written", "size"),
    [("7", 7), ("7B", 7), ("120MB", 120_000_000), ("1.5 GiB", 3 << 29), ("0.29KB", 290)],
)
def test_a_budget_has_a_unit(server: FakeServer, run: Run, written: str, size: int) -> None:
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=JOB)
    code, _, err = run("quantize", "a", "m", "--scheme", "auto", "--budget", written, "--no-wait")
    assert code == 0, err
    (request,) = server.requests("Quantize")
    assert request.scheme.auto.max_live_bytes == size


@pytest.mark.parametrize("state", [JOB_STATE_SUCCEEDED, JOB_STATE_FAILED])
def test_what_auto_has_tried_is_a_table_or_json(
    server: FakeServer, run: Run, state: JobState.ValueType
) -> None:
    report = quality_pb2.QualityReport(mean_kl=0.1234, top1_agreement=0.75)
    trials = [
        quality_pb2.Trial(scheme="int8", live_bytes=3 << 20, verdict="not made: too large"),
        quality_pb2.Trial(scheme="nf4", live_bytes=2 << 20, quality=report, verdict="the end"),
    ]
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=JOB)
    server.on["WatchJob"] = job_events(JOB, Job(id="j1", state=state, trials=trials))
    server.on["GetModel"] = lambda *_: model.GetModelResponse(model=MODEL)
    command = ("quantize", "a", "m", "--scheme", "auto", "--budget", "1GB")
    failed = int(state == JOB_STATE_FAILED)
    code, out, _ = run(*command)
    assert code == failed
    assert [line.split() for line in out.splitlines()[:3]] == [
        ["TRIED", "LIVE", "KL", "MEAN", "TOP-1", "VERDICT"],
        ["int8", "3.0", "MiB", "not", "made:", "too", "large"],
        ["nf4", "2.0", "MiB", "0.1234", "75.0%", "the", "end"],
    ]
    code, out, _ = run(*command, "--json")
    assert code == failed
    assert [one["verdict"] for one in json.loads(out)["trials"]] == [
        "not made: too large",
        "the end",
    ]


def test_quantize_takes_calibration_text(
    server: FakeServer, run: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=JOB)
    monkeypatch.chdir(tmp_path)
    command = ("quantize", "a", "m", "--scheme", "gptq", "--no-wait")
    run(*command)
    file = ("--calibration-text", "lines.jsonl", "--calibration-field", "messages")
    numbers = ("--calibration-samples", "4", "--calibration-tokens", "16")
    run(*command, *file, *numbers, "--calibration-seed", "7", "--chat-template")
    run(*command, "--calibration-dataset", "c4")
    plain, lines, dataset = server.requests("Quantize")
    assert not plain.HasField("calibration")
    path = str(tmp_path / "lines.jsonl")
    assert lines.calibration == quantization.Calibration(
        source=quantization.TextSource(file=quantization.TextFile(path=path, field="messages")),
        samples=4,
        sequence_tokens=16,
        seed=7,
        chat_template=True,
    )
    assert dataset.calibration == quantization.Calibration(
        source=quantization.TextSource(dataset="c4")
    )


def test_no_wait_prints_the_job_and_no_evaluation_measures_nothing(
    server: FakeServer, run: Run
) -> None:
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=JOB)
    assert run("quantize", "a", "m", "--scheme", "int8", "--no-wait", "--no-evaluation") == (
        0,
        "j1\n",
        "",
    )
    (request,) = server.requests("Quantize")
    assert request.skip_evaluation
    assert not request.HasField("evaluation")


def test_a_picture_without_matplotlib_says_what_to_install(
    server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "lowbit.cli.plot", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("compare", "a", "b", "--plot", "out.png")
    assert (code, out) == (2, "")
    assert "pip install 'lowbit[plot]'" in err
    assert server.seen == []  # it is said before anything is measured


def test_a_dry_run_starts_nothing(server: FakeServer, run: Run) -> None:
    server.on["Quantize"] = lambda *_: quantization.QuantizeResponse(job=Job())
    code, out, _ = run("quantize", "a", "m", "--scheme", "int8", "--dry-run")
    assert (code, out) == (0, "all is well; nothing was started\n")
    assert server.requests("Quantize")[0].validate_only


def test_a_job_that_fails_is_an_error(
    server: FakeServer, run: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Job(
        id="j1",
        state=JOB_STATE_FAILED,
        error=JobError(reason=ERROR_REASON_DISK_FULL, message="no space"),
    )
    server.on["ImportModel"] = lambda *_: model.ImportModelResponse(job=JOB)
    server.on["WatchJob"] = job_events(JOB, failed)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("import", "m", "folder", "--type", "bf16")
    assert (code, out) == (1, "")
    assert err.endswith("lowbit: error: DISK_FULL: job j1 failed: no space\n")
    assert server.requests("ImportModel")[0].source.path == str(tmp_path / "folder")


def test_watching_a_job_prints_a_line_per_event(server: FakeServer, run: Run) -> None:
    server.on["WatchJob"] = job_events(JOB, Job(id="j1", state=JOB_STATE_SUCCEEDED))
    code, out, _ = run("jobs", "watch", "j1", "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [line["job"]["state"] for line in lines] == ["JOB_STATE_RUNNING", "JOB_STATE_SUCCEEDED"]


def test_changes_say_what_they_did(server: FakeServer, run: Run) -> None:
    server.on["Load"] = lambda *_: iter(
        [model.LoadResponse(worker="cpu/0", phase=model.LOAD_PHASE_LIVE, live_bytes=2048)]
    )
    server.on["Unload"] = lambda *_: model.UnloadResponse(replicas=1, freed_bytes=2048)
    server.on["DeleteModel"] = lambda *_: model.DeleteModelResponse()
    server.on["SetAlias"] = lambda *_: model.SetAliasResponse()
    server.on["CancelJob"] = lambda *_: CancelJobResponse(job=JOB)
    assert run("load", "m", "--replicas", "1")[:2] == (0, "m: 2.0 KiB live on cpu/0\n")
    assert run("unload", "m", "--force")[1] == "m: 1 unloaded, 2.0 KiB freed\n"
    assert run("models", "delete", "m")[1] == "m: deleted\n"
    assert run("models", "alias", "best", "m")[1] == "best -> m\n"
    assert run("models", "alias", "best")[1] == "best: removed\n"
    assert run("jobs", "cancel", "j1")[1] == "j1: running\n"


def test_a_job_that_can_be_resumed_says_how(server: FakeServer, run: Run) -> None:
    cancelled = Job(id="j1", state=JOB_STATE_CANCELLED, device="cpu", resumable=True)
    server.on["GetJob"] = lambda *_: GetJobResponse(job=cancelled)
    assert "lowbit jobs resume j1" in run("jobs", "show", "j1")[1]
    queued = Job(id="j1", state=JOB_STATE_QUEUED, queue_position=2)
    server.on["ResumeJob"] = lambda *_: ResumeJobResponse(job=queued)
    assert run("jobs", "resume", "j1")[:2] == (0, "j1: queued\n")
    server.on["ResumeJob"] = lambda _, context: refuse(
        context, grpc.StatusCode.FAILED_PRECONDITION, "JOB_NOT_RESUMABLE", message="ended well"
    )
    code, _, err = run("jobs", "resume", "j1")
    assert code == 1
    assert "ended well" in err
    paused = Job(id="j1", state=JOB_STATE_PAUSED)
    server.on["ListJobs"] = lambda *_: ListJobsResponse(jobs=[paused])
    assert "paused" in run("jobs", "list", "--state", "paused")[1]


def test_control_c_outside_of_a_command_exits_with_130(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.cli.app.run", interrupted)
    assert run("info") == (130, "", "")


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for name in (
        *("import", "quantize", "estimate", "evaluate", "compare", "load", "unload", "generate"),
        "score",
        *("models", "jobs"),
        *("devices", "info", "schemes", "demo"),
    ):
        assert f" {name} " in out


def test_the_token_of_the_environment_is_sent(
    server: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOWBIT_TOKEN", "secret")
    server.on["ListDevices"] = lambda *_: runtime.ListDevicesResponse()
    assert run("devices", "--json")[0] == 0
    assert run("devices", "--json")[0] == 0
    assert server.seen[-1].metadata["authorization"] == "Bearer secret"
    code, _, err = run("devices", address="lowbit.invalid:1")
    assert (code, err.count("\n")) == (2, 1)
    assert "token needs tls" in err
