"""Jobs, artefacts and their names, through a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode

from lowbit import scheme
from lowbit.v1 import errors_pb2, quantization_pb2
from lowbit.v1 import job_pb2 as pb
from lowbit_server.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SERVER_ENVIRONMENT = {"LOWBIT_MAX_QUEUED_JOBS": "2", "LOWBIT_MAX_RUNNING_JOBS": "1"}


@pytest.fixture(scope="module")
def scripted(service: Any) -> str:
    """Path of a source that is imported fast."""
    return str(scripted_model(service.sources / "any"))


@pytest.fixture(scope="module")
def tiny(service: Any, float_source: Callable[..., Path]) -> str:
    """A model with real weights in the store."""
    source = float_source(service.sources / "tiny", fill=b"\x00\x00\x80\x3c")
    return service.import_float("tiny", source)


@pytest.fixture
def frozen(service: Any, scripted: str, request: pytest.FixtureRequest) -> Iterator[pb.Job]:
    """A job that runs and does not get on, so that others queue behind it."""
    job = service.client.import_model(f"frozen-{abs(hash(request.node.name))}", path=scripted)
    yield service.freeze_job(job.id)
    service.client.cancel_job(job.id)
    ended(service, job.id)


def ended(service: Any, job_id: str) -> pb.Job:
    """Wait for a job's end and return it."""
    *_, last = service.client.watch_job(job_id)
    return last.job


def start(service: Any, name: str, path: str, **options: Any) -> pb.Job:
    return service.client.import_model(name, path=path, **options)


def staged(service: Any) -> list[str]:
    return [path.name for path in (service.server.home / "staging").iterdir()]


def published(service: Any) -> list[str]:
    return [path.name for path in (service.server.home / "models").iterdir()]


# Watching


def test_every_watcher_sees_the_same_sequence_whenever_it_joins(
    service: Any, scripted: str, frozen: pb.Job
) -> None:
    job = start(service, "watched", scripted)
    early = [service.client.watch_job(job.id) for _ in range(3)]
    first = [next(stream) for stream in early]
    assert {(one.job.state, one.job.queue_position) for one in first} == {(pb.JOB_STATE_QUEUED, 1)}
    service.client.cancel_job(frozen.id)
    middle = service.once.watch_job(job.id)
    ended(service, job.id)
    late = [list(service.client.watch_job(job.id)) for _ in range(2)]
    complete = late[0]
    assert late[1] == complete
    assert list(middle) == complete
    for begin, stream in zip(first, early, strict=True):
        assert [begin, *stream] == complete
    assert [one.sequence for one in complete] == list(range(1, len(complete) + 1))
    assert [one.job.sequence for one in complete] == [one.sequence for one in complete]
    states = [one.job.state for one in complete]
    assert states == sorted(states)
    assert states[0] == pb.JOB_STATE_QUEUED
    assert states[-1] == pb.JOB_STATE_SUCCEEDED
    assert complete[-1].job == service.client.get_job(job.id)


def test_a_watcher_can_go_on_after_a_sequence_number(service: Any, scripted: str) -> None:
    job = start(service, "resumed", scripted)
    complete = list(service.client.watch_job(job.id))
    assert list(service.client.watch_job(job.id, after_sequence=2)) == complete[2:]
    assert not list(service.client.watch_job(job.id, after_sequence=complete[-1].sequence))
    assert not list(service.client.watch_job(job.id, after_sequence=10**6))


def test_a_job_names_what_it_does_and_when(service: Any, scripted: str) -> None:
    job = ended(service, start(service, "described", scripted, request_id="its-id").id)
    assert job.kind == pb.JOB_KIND_IMPORT
    assert (job.model, job.source, job.request_id) == ("described", scripted, "its-id")
    assert job.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds()
    assert job.start_time.ToNanoseconds() < job.end_time.ToNanoseconds()
    assert job.progress.peak_memory_bytes > 0
    assert not job.HasField("error")


def test_quantizing_streams_progress_and_publishes_a_model(service: Any, tiny: str) -> None:
    job = service.client.quantize(tiny, "tiny-bf16", "bf16", skip_evaluation=True)
    assert (job.kind, job.scheme, job.source) == (pb.JOB_KIND_QUANTIZE, "bf16", tiny)
    events = list(service.client.watch_job(job.id))
    assert events[-1].job.state == pb.JOB_STATE_SUCCEEDED, events[-1].job.error
    steps = [one.job.progress for one in events if one.job.HasField("progress")]
    assert {pb.JOB_PHASE_QUANTIZE, pb.JOB_PHASE_SAVE} <= {one.phase for one in steps}
    assert any(one.done == one.total > 0 for one in steps if one.phase == pb.JOB_PHASE_QUANTIZE)
    model = service.client.get_model("tiny-bf16")
    source = service.client.get_model(tiny)
    assert (model.scheme, model.parent, model.source) == ("bf16", tiny, tiny)
    assert model.source_digest == source.revision != model.revision
    assert model.parameters == source.parameters
    assert model.disk_bytes < source.disk_bytes
    assert service.client.verify_model("tiny-bf16").bytes == model.disk_bytes


# Listing


def test_jobs_are_listed_page_by_page_newest_first(service: Any, scripted: str) -> None:
    made = []
    for index in range(3):
        made.append(start(service, f"listed-{index}", scripted).id)
        ended(service, made[-1])
    first = service.jobs.ListJobs(pb.ListJobsRequest(page_size=2), timeout=30)
    assert [one.id for one in first.jobs] == [made[2], made[1]]
    second = service.jobs.ListJobs(
        pb.ListJobsRequest(page_size=2, page_token=first.next_page_token), timeout=30
    )
    assert second.jobs[0].id == made[0]
    everything = [one.id for one in service.client.jobs()]
    assert [one.id for one in service.client.jobs(page_size=2)] == everything
    assert len(everything) == len(set(everything))


def test_jobs_are_listed_by_state(service: Any, scripted: str, frozen: pb.Job) -> None:
    waiting = start(service, "waiting", scripted)

    def listed(*states: int) -> set[str]:
        return {one.id for one in service.client.jobs(states)}

    assert listed(pb.JOB_STATE_RUNNING) == {frozen.id}
    assert listed(pb.JOB_STATE_QUEUED) == {waiting.id}
    assert listed(pb.JOB_STATE_QUEUED, pb.JOB_STATE_RUNNING) == {frozen.id, waiting.id}
    assert not listed(pb.JOB_STATE_PAUSED)
    service.client.cancel_job(waiting.id)
    assert waiting.id in listed(pb.JOB_STATE_CANCELLED)


@pytest.mark.parametrize("token", ["x", "-1", "1.5", "²", "9" * 100])
def test_a_page_token_that_no_page_gave(service: Any, token: str) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        service.jobs.ListJobs(pb.ListJobsRequest(page_token=token), timeout=30)
    assert [one.field for one in refusal.error.violations] == ["page_token"]


def test_models_are_listed_page_by_page_in_order(service: Any, tiny: str) -> None:
    service.import_scripted("zebra")
    names = [one.name for one in service.client.models()]
    assert names == sorted(names)
    assert {"zebra", tiny} <= set(names)
    assert [one.name for one in service.client.models(page_size=1)] == names


@pytest.mark.parametrize("method", ["GetJob", "WatchJob", "CancelJob", "ResumeJob", "DeleteJob"])
def test_a_job_that_nobody_knows(service: Any, method: str) -> None:
    request = getattr(pb, f"{method}Request")(id="nobody")
    with service.refused(StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
        answer = getattr(service.jobs, method)(request, timeout=30)
        if method == "WatchJob":
            next(answer)


# Cancelling and deleting


def test_a_queued_job_is_cancelled_at_once(service: Any, scripted: str, frozen: pb.Job) -> None:
    first, second = (start(service, name, scripted) for name in ("behind-1", "behind-2"))
    assert (first.queue_position, second.queue_position) == (1, 2)
    cancelled = service.client.cancel_job(first.id)
    assert cancelled.state == pb.JOB_STATE_CANCELLED
    assert not cancelled.HasField("start_time")
    assert service.client.get_job(second.id).queue_position == 1
    assert service.client.cancel_job(first.id) == cancelled
    service.client.cancel_job(second.id)
    assert not {"behind-1", "behind-2"} & set(published(service))


def test_a_running_job_that_is_cancelled_leaves_nothing(
    service: Any, float_source: Callable[..., Path], eventually: Callable[..., Any]
) -> None:
    source = float_source(service.sources / "big", layers=16, hidden=704)  # 0.3 GB of zeros
    job = start(service, "big", str(source))
    folder = service.server.home / "staging" / job.id

    def writing() -> bool:
        return any(file.stat().st_size > 1 << 20 for file in folder.glob("*"))

    eventually(writing)
    service.freeze_job(job.id)
    assert writing()
    assert service.client.cancel_job(job.id).state in {
        pb.JOB_STATE_CANCELLING,
        pb.JOB_STATE_CANCELLED,
    }
    last = ended(service, job.id)
    assert last.state == pb.JOB_STATE_CANCELLED
    assert not service.job_processes()
    assert not staged(service)
    assert "big" not in published(service)
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.get_model("big")


def test_a_process_that_dies_is_replaced(service: Any, scripted: str) -> None:
    job = start(service, "replaced", scripted)
    service.freeze_job(job.id)
    for process in service.job_processes():
        process.kill()
    assert ended(service, job.id).state == pb.JOB_STATE_SUCCEEDED


def test_a_job_whose_processes_keep_dying_fails_and_can_be_resumed(
    service: Any, scripted: str, eventually: Callable[..., Any]
) -> None:
    job = start(service, "orphan", scripted)
    dead: set[int] = set()
    while len(dead) < 3:
        (process,) = eventually(
            lambda: [one for one in service.job_processes() if one.pid not in dead]
        )
        process.kill()
        dead.add(process.pid)
    last = ended(service, job.id)
    assert last.state == pb.JOB_STATE_FAILED
    assert last.error.reason == errors_pb2.ERROR_REASON_JOB_PROCESS_LOST
    assert last.resumable
    assert not service.job_processes()
    assert not staged(service)
    resumed = service.client.resume_job(job.id)
    assert (resumed.state, resumed.resumable) == (pb.JOB_STATE_QUEUED, False)
    assert not resumed.HasField("error")
    assert not resumed.HasField("end_time")
    events = list(service.client.watch_job(job.id))
    assert [one.sequence for one in events] == list(range(1, len(events) + 1))
    assert events[last.sequence - 1].job == last
    assert events[-1].job.state == pb.JOB_STATE_SUCCEEDED
    assert not events[-1].job.resumable


def test_what_cannot_be_resumed_is_refused(
    service: Any, scripted: str, tiny: str, frozen: pb.Job
) -> None:
    def refused(job: pb.Job, reason: str, code: StatusCode) -> str:
        assert service.client.get_job(job.id).resumable == (reason == "QUEUE_FULL")
        with service.refused(code, reason) as refusal:
            service.once.resume_job(job.id)
        return refusal.error.message

    waiting = start(service, "waits", scripted)
    for job in (frozen, waiting):
        assert "by itself" in refused(job, "JOB_NOT_RESUMABLE", StatusCode.FAILED_PRECONDITION)
    done = next(one for one in service.client.jobs([pb.JOB_STATE_SUCCEEDED]))
    assert "ended well" in refused(done, "JOB_NOT_RESUMABLE", StatusCode.FAILED_PRECONDITION)
    service.client.cancel_job(waiting.id)
    others = [start(service, f"other-{index}", scripted) for index in range(2)]
    refused(waiting, "QUEUE_FULL", StatusCode.RESOURCE_EXHAUSTED)
    for job in others:
        service.client.cancel_job(job.id)
    service.client.set_alias("waits", tiny)
    refused(waiting, "MODEL_EXISTS", StatusCode.ALREADY_EXISTS)
    service.client.set_alias("waits", "")
    again = service.client.resume_job(waiting.id)
    assert (again.state, again.queue_position) == (pb.JOB_STATE_QUEUED, 1)
    service.client.cancel_job(again.id)
    with service.refused(StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
        service.client.resume_job("nobody")


def test_a_cancelled_job_does_not_keep_its_source(service: Any, tiny: str) -> None:
    service.client.wait_job(service.client.quantize(tiny, "between", "bf16").id)
    job = service.client.quantize("between", "from-between", "fp32")
    service.freeze_job(job.id)
    service.client.cancel_job(job.id)
    assert ended(service, job.id).resumable
    service.client.delete_model("between")
    assert not service.client.get_job(job.id).resumable
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.resume_job(job.id)


def test_imports_do_not_wait_for_a_device(service: Any, tiny: str, frozen: pb.Job) -> None:
    assert frozen.device == ""
    job = service.client.quantize(tiny, "beside", "bf16")
    assert (job.device, job.queue_position) == ("cpu", 1)
    assert ended(service, job.id).state == pb.JOB_STATE_SUCCEEDED
    assert service.client.get_job(frozen.id).state == pb.JOB_STATE_RUNNING


def test_the_jobs_that_wait_are_told_their_places(
    service: Any, scripted: str, frozen: pb.Job
) -> None:
    first, second = (start(service, name, scripted) for name in ("place-1", "place-2"))
    watched = service.client.watch_job(second.id)
    assert next(watched).job.queue_position == 2
    service.client.cancel_job(first.id)
    assert next(watched).job.queue_position == 1
    assert service.client.get_job(second.id).queue_position == 1
    (listed,) = service.client.jobs([pb.JOB_STATE_QUEUED])
    assert (listed.id, listed.queue_position) == (second.id, 1)
    watched.close()
    service.client.cancel_job(second.id)


def test_only_ended_jobs_are_deleted(service: Any, scripted: str, frozen: pb.Job) -> None:
    waiting = start(service, "not-yet", scripted)
    for job in (frozen, waiting):
        with service.refused(StatusCode.FAILED_PRECONDITION, "JOB_NOT_ENDED"):
            service.client.delete_job(job.id)
    service.client.cancel_job(waiting.id)
    service.client.delete_job(waiting.id)
    with service.refused(StatusCode.NOT_FOUND, "JOB_NOT_FOUND"):
        service.client.get_job(waiting.id)
    assert waiting.id not in [one.id for one in service.client.jobs()]


def test_what_a_deleted_job_made_stays(service: Any, scripted: str) -> None:
    job = ended(service, start(service, "kept", scripted).id)
    service.client.delete_job(job.id)
    assert service.client.get_model("kept").name == "kept"


# Starting


def test_a_request_id_makes_creation_idempotent(service: Any, scripted: str) -> None:
    job = start(service, "once", scripted, request_id="only-once")
    assert start(service, "once", scripted, request_id="only-once").id == job.id
    assert ended(service, job.id).state == pb.JOB_STATE_SUCCEEDED
    # Also when it has ended and the name is taken by what it made.
    again = start(service, "once", scripted, request_id="only-once")
    assert (again.id, again.state) == (job.id, pb.JOB_STATE_SUCCEEDED)
    with service.refused(StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED") as refusal:
        start(service, "another", scripted, request_id="only-once")
    assert refusal.error.metadata["job"] == job.id
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        start(service, "once", scripted)


def test_validate_only_checks_and_starts_nothing(service: Any, scripted: str, tiny: str) -> None:
    before = [one.id for one in service.client.jobs()]
    for _ in range(2):
        job = start(service, "unborn", scripted, validate_only=True)
        assert (job.id, job.model) == ("", "unborn")
        job = service.client.quantize(tiny, "unborn", "int8", validate_only=True)
        assert (job.id, job.scheme) == ("", "int8")
    with service.refused(StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND"):
        start(service, "unborn", str(service.sources / "nothing"), validate_only=True)
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        service.client.quantize(tiny, tiny, "int8", validate_only=True)
    assert [one.id for one in service.client.jobs()] == before
    assert not service.job_processes()


def test_a_job_beyond_the_queue_is_refused(service: Any, scripted: str, frozen: pb.Job) -> None:
    waiting = [start(service, f"queued-{index}", scripted) for index in range(2)]
    assert [one.queue_position for one in waiting] == [1, 2]
    with service.refused(StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL") as refusal:
        service.once.import_model("one-too-many", path=scripted)
    assert refusal.error.retry_after_s is not None
    with service.client.watch_runtime(0.1) as snapshots:
        snapshot = next(snapshots)
    assert (snapshot.running_jobs, snapshot.queued_jobs) == (1, 2)
    for job in waiting:
        service.client.cancel_job(job.id)


def test_a_name_that_a_job_is_making_is_taken(service: Any, scripted: str, frozen: pb.Job) -> None:
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        start(service, frozen.model, scripted)


# Models


def test_a_model_that_is_used_is_not_deleted(service: Any, tiny: str) -> None:
    loaded = service.load_scripted("loaded")
    with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE"):
        service.client.delete_model(loaded)
    service.client.unload(loaded)
    service.client.delete_model(loaded)
    job = service.client.quantize(tiny, "from-tiny", scheme("fp16"))
    service.freeze_job(job.id)
    for name in (tiny, "from-tiny"):
        with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE") as refusal:
            service.client.delete_model(name)
        assert job.id in refusal.error.message
    service.client.cancel_job(job.id)
    ended(service, job.id)
    assert tiny in published(service)


def test_a_deleted_model_is_gone_with_its_files_and_aliases(service: Any) -> None:
    name = service.import_scripted("doomed")
    service.client.set_alias("doomed-alias", name)
    service.client.delete_model(name)
    for gone in (name, "doomed-alias"):
        with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
            service.client.get_model(gone)
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.delete_model(name)
    assert name not in published(service)
    assert not staged(service)


def test_aliases_are_set_moved_and_removed(service: Any, scripted: str) -> None:
    first, second = service.import_scripted("first"), service.import_scripted("second")
    service.client.set_alias("current", first)
    assert service.client.get_model("current").name == first
    service.client.set_alias("also", "current")
    assert list(service.client.get_model(first).aliases) == ["also", "current"]
    service.client.set_alias("current", second)
    assert service.client.get_model("current").name == second
    assert list(service.client.get_model(first).aliases) == ["also"]
    service.client.set_alias("current", "")
    for removed in ("get_model", "delete_model"):
        with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
            getattr(service.client, removed)("current")
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.set_alias("current", "")
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.delete_model("also")
    assert service.client.get_model("also").name == first


def test_an_alias_and_a_model_never_share_a_name(service: Any, scripted: str) -> None:
    name = service.import_scripted("named")
    service.client.set_alias("taken", name)
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        start(service, "taken", scripted)
    other = service.import_scripted("other")
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        service.client.set_alias(name, other)
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"):
        service.client.set_alias(name, name)
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.set_alias("dangling", "nobody")


def test_an_alias_cannot_take_the_name_that_a_job_is_making(
    service: Any, tiny: str, frozen: pb.Job
) -> None:
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        service.client.set_alias(frozen.model, tiny)


def test_verify_finds_a_flipped_byte(service: Any) -> None:
    name = service.import_scripted("verified")
    model = service.client.get_model(name)
    found = service.client.verify_model(name)
    assert (found.files, found.bytes) == (len(model.files), model.disk_bytes)
    assert sum(file.bytes for file in model.files) == model.disk_bytes
    file = service.server.home / "models" / name / "tokenizer.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    with service.refused(StatusCode.DATA_LOSS, "ARTIFACT_CORRUPT") as refusal:
        service.client.verify_model(name)
    assert refusal.error.metadata["file"] == "tokenizer.json"
    assert "tokenizer.json" in refusal.error.message


def test_schemes_say_where_they_can_be_used(service: Any) -> None:
    schemes = {one.name: one for one in service.client.list_schemes()}
    assert set(schemes) == {"fp32", "fp16", "bf16", "int8", "nf4", "fp4", "gptq", "awq", "rtn"}
    usable = quantization_pb2.SchemeAvailability(device="cpu", can_quantize=True, can_serve=True)
    for name in ("fp32", "fp16", "bf16", "int8", "nf4", "fp4", "rtn"):
        assert schemes[name].availability == [usable]
    for name in ("gptq", "awq"):
        (found,) = schemes[name].availability
        # What some models need although others do not.
        assert "gptqmodel" in found.reason
        found.ClearField("reason")
        assert found == usable
