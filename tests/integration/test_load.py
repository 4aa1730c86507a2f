"""Load, Unload and what devices show, through a real server with two workers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from grpc import StatusCode

from lowbit.v1 import generation_pb2, model_pb2, runtime_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SERVER_FLAGS = ("--workers-per-device", "2")
MINUTE_MS = 60_000
PHASES = (
    model_pb2.LOAD_PHASE_READ,
    model_pb2.LOAD_PHASE_PLACE,
    model_pb2.LOAD_PHASE_WARM_UP,
    model_pb2.LOAD_PHASE_LIVE,
)


@pytest.fixture(scope="module")
def slow(service: Any) -> str:
    """A model that takes a minute to load."""
    return service.import_scripted("slow", load_ms=MINUTE_MS)


def workers(service: Any) -> list[runtime_pb2.Worker]:
    return list(service.client.devices()[0].workers)


def live(service: Any, model: str) -> list[str]:
    """Return the workers that hold a model, as ListDevices shows it."""
    return [one.worker for one in service.client.devices()[0].models if one.model == model]


def states(service: Any, model: str) -> list[int]:
    return [one.state for one in service.client.get_model(model).replicas]


def finish_of(events: Iterable[generation_pb2.GenerateResponse]) -> int:
    (reason,) = [one.output_finished.reason for one in events if one.HasField("output_finished")]
    return reason


def start_stream(service: Any, model: str, **fields: Any) -> Any:
    """Start a generation and return it once it runs."""
    stream = service.stream(model, "hello", **fields)
    assert next(stream).HasField("started")
    return stream


# Load


def test_progress_goes_through_the_phases_in_order(service: Any) -> None:
    name = service.import_scripted("phases", load_ms=150)
    messages = list(service.client.load(name))
    assert {one.device for one in messages} == {"cpu"}
    assert len({one.worker for one in messages}) == 1
    seen = [one.phase for one in messages]
    assert seen == sorted(seen)
    assert set(seen) == set(PHASES)
    assert all(0 <= one.fraction <= 1 for one in messages)
    assert messages[-1].phase == model_pb2.LOAD_PHASE_LIVE
    assert messages[-1].fraction == 1


def test_a_load_that_is_repeated_changes_nothing(service: Any) -> None:
    name = service.load_scripted("repeated", load_ms=50)
    before = live(service, name)
    (message,) = service.client.load(name)
    assert message.phase == model_pb2.LOAD_PHASE_LIVE
    assert [message.worker] == before == live(service, name)


def test_a_model_is_loaded_by_its_alias_too(service: Any) -> None:
    name = service.import_scripted("aliased")
    service.client.set_alias("its-alias", name)
    service.client.load("its-alias").wait()
    assert len(live(service, name)) == 1
    assert service.client.unload("its-alias").replicas == 1


def test_two_clients_join_one_load_and_both_see_its_end(service: Any) -> None:
    name = service.import_scripted("joined", load_ms=600)
    first = service.client.load(name)
    began = next(first)
    second = service.once.load(name)
    joined = next(second)
    assert joined.worker == began.worker
    assert joined.phase != model_pb2.LOAD_PHASE_LIVE
    for stream in (first, second):
        assert list(stream)[-1].phase == model_pb2.LOAD_PHASE_LIVE
    assert len(live(service, name)) == 1


def test_a_load_goes_on_while_somebody_waits_for_it(service: Any) -> None:
    name = service.import_scripted("shared", load_ms=600)
    first, second = service.client.load(name), service.once.load(name)
    next(first)
    next(second)
    first.close()
    assert list(second)[-1].phase == model_pb2.LOAD_PHASE_LIVE


def test_a_load_that_nobody_waits_for_is_stopped(
    service: Any, slow: str, eventually: Callable[..., Any]
) -> None:
    first, second = service.client.load(slow), service.once.load(slow)
    next(first)
    next(second)
    assert states(service, slow) == [model_pb2.REPLICA_STATE_LOADING]
    first.close()
    second.close()
    eventually(lambda: not states(service, slow))


def test_a_load_after_a_stopped_one_begins_anew(service: Any, slow: str) -> None:
    for _ in range(20):  # each of them while the one before is still being stopped
        with service.client.load(slow) as load:
            assert next(load).phase == model_pb2.LOAD_PHASE_READ


def test_a_stopped_load_frees_the_name(service: Any, eventually: Callable[..., Any]) -> None:
    name = service.import_scripted("freed", load_ms=MINUTE_MS)
    with service.client.load(name) as load:
        next(load)
        with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_IN_USE"):
            service.client.delete_model(name)
    eventually(lambda: not states(service, name))
    service.client.delete_model(name)
    service.import_scripted(name)
    service.client.load(name).wait()


def test_the_device_can_be_chosen(service: Any) -> None:
    name = service.import_scripted("placed")
    (last,) = service.client.load(name, device="cpu").wait()
    assert last.device == "cpu"


@pytest.mark.parametrize("device", ["cuda:0", "CPU", "cpu/0", " "])
def test_a_device_that_the_server_does_not_have(service: Any, slow: str, device: str) -> None:
    with service.refused(StatusCode.NOT_FOUND, "DEVICE_NOT_FOUND") as refusal:
        service.client.load(slow, device=device).wait()
    assert refusal.error.metadata["device"] == device
    assert "cpu" in refusal.error.message


def test_a_model_that_is_not_in_the_store(service: Any) -> None:
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.load("nobody").wait()


def test_replicas_share_the_requests(
    service: Any, slow: str, eventually: Callable[..., Any]
) -> None:
    name = service.load_scripted("twice", replicas=2, step_ms=5)
    assert sorted(live(service, name)) == ["cpu/0", "cpu/1"]
    streams = [start_stream(service, name) for _ in range(4)]
    eventually(lambda: [one.running_requests for one in workers(service)] == [2, 2])
    for stream in streams:
        stream.cancel()


def test_a_replica_can_be_added(service: Any, slow: str) -> None:
    name = service.load_scripted("grown")
    before = live(service, name)
    service.client.load(name, replicas=2).wait()
    assert len(before) == 1
    assert len(live(service, name)) == 2


def test_more_replicas_than_workers(service: Any, slow: str) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        service.client.load(slow, replicas=3).wait()
    assert [one.field for one in refusal.error.violations] == ["replicas"]
    assert not states(service, slow)


def test_a_load_that_fails_says_why_and_leaves_nothing(service: Any) -> None:
    name = service.import_scripted("broken", load_ms=30, faults=[{"kind": "load_error"}])
    healthy = service.load_scripted("healthy", step_ms=1)
    for _ in range(2):
        with service.refused(StatusCode.FAILED_PRECONDITION, "LOAD_FAILED") as refusal:
            service.client.load(name).wait()
        assert "scripted load error" in refusal.error.message
        assert not states(service, name)
    assert service.client.generate(healthy, "hi", max_tokens=2).text() == "hi"


# Unload


def test_unload_waits_for_running_streams_and_takes_no_new_ones(
    service: Any, eventually: Callable[..., Any]
) -> None:
    name = service.load_scripted("drained", step_ms=5)
    stream = start_stream(service, name, stopping={"max_tokens": 100})
    request = model_pb2.UnloadRequest(model=name)
    unload = service.models.Unload.future(request, timeout=30)
    eventually(lambda: states(service, name) == [model_pb2.REPLICA_STATE_DRAINING])
    with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED"):
        service.generate(name, "late")
    assert not unload.done()
    assert finish_of(stream) == generation_pb2.FINISH_REASON_MAX_TOKENS
    assert unload.result().replicas == 1
    assert not live(service, name)


def test_a_load_during_a_drain_waits_for_its_end(
    service: Any, eventually: Callable[..., Any]
) -> None:
    name = service.load_scripted("again", step_ms=5)
    stream = start_stream(service, name, stopping={"max_tokens": 60})
    unload = service.models.Unload.future(model_pb2.UnloadRequest(model=name), timeout=30)
    eventually(lambda: states(service, name) == [model_pb2.REPLICA_STATE_DRAINING])
    load = service.client.load(name)
    assert finish_of(stream) == generation_pb2.FINISH_REASON_MAX_TOKENS
    assert unload.result().replicas == 1
    assert load.wait()[0].phase == model_pb2.LOAD_PHASE_LIVE
    assert states(service, name) == [model_pb2.REPLICA_STATE_LIVE]


@pytest.mark.parametrize(("force", "drain_timeout"), [(False, 0.2), (False, 0.0), (True, 3600)])
def test_streams_that_do_not_end_in_time_are_cancelled(
    service: Any,
    force: bool,  # noqa: FBT001 - a column of the case
    drain_timeout: float,
) -> None:
    name = service.load_scripted(f"cut-{force}-{drain_timeout}", step_ms=5)
    stream = start_stream(service, name)
    began = time.monotonic()
    answer = service.client.unload(name, drain_timeout=drain_timeout, force=force)
    assert answer.replicas == 1
    assert time.monotonic() - began >= (0 if force else drain_timeout)
    events = list(stream)
    assert finish_of(events) == generation_pb2.FINISH_REASON_CANCELLED
    assert events[-1].completed.usage.output_tokens > 0
    assert not live(service, name)


def test_unload_takes_off_every_replica(service: Any, slow: str) -> None:
    name = service.load_scripted("both", replicas=2)
    assert service.client.unload(name).replicas == 2
    assert not live(service, name)
    with service.refused(StatusCode.FAILED_PRECONDITION, "MODEL_NOT_LOADED"):
        service.client.unload(name)


def test_unload_stops_a_load_and_tells_those_who_wait_for_it(service: Any, slow: str) -> None:
    load = service.client.load(slow)
    next(load)
    assert service.client.unload(slow).replicas == 1
    with service.refused(StatusCode.CANCELLED, "CANCELLED"):
        load.wait()
    assert not states(service, slow)


# What is shown


def test_watch_model_sees_each_state(service: Any) -> None:
    name = service.import_scripted("watched", step_ms=5, load_ms=60)
    seen: list[list[int]] = []
    with service.client.watch_model(name) as watch:

        def follow(upto: list[int]) -> model_pb2.Model:
            for message in watch:
                seen.append([one.state for one in message.model.replicas])
                if seen[-1] == upto:
                    return message.model
            raise AssertionError(seen)

        assert follow([]).name == name
        service.client.load(name).wait()
        assert follow([model_pb2.REPLICA_STATE_LIVE]).replicas[0].device == "cpu"
        stream = start_stream(service, name, stopping={"max_tokens": 40})
        unload = service.models.Unload.future(model_pb2.UnloadRequest(model=name), timeout=30)
        follow([model_pb2.REPLICA_STATE_DRAINING])
        list(stream)
        unload.result()
        follow([])
        assert [model_pb2.REPLICA_STATE_LOADING] in seen
        service.client.set_alias("seen-too", name)
        assert list(next(watch).model.aliases) == ["seen-too"]
        service.client.delete_model(name)
        with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
            next(watch)


def test_devices_show_workers_and_live_models(service: Any, slow: str) -> None:
    name = service.load_scripted("shown")
    (device,) = service.client.devices()
    assert device.name == "cpu"
    assert device.description
    assert 0 < device.free_bytes <= device.total_bytes
    assert [one.name for one in device.workers] == ["cpu/0", "cpu/1"]
    for worker in device.workers:
        assert worker.state == runtime_pb2.WORKER_STATE_READY
        assert psutil.Process(worker.pid).ppid() == service.server.pid
        assert worker.resident_bytes > 0
        assert worker.restarts == 0
    assert len(live(service, name)) == 1


def test_watch_runtime_shows_what_runs(service: Any) -> None:
    name = service.load_scripted("busy", step_ms=2)
    stream = start_stream(service, name)
    with service.client.watch_runtime(0.1) as snapshots:
        for snapshot in snapshots:
            if snapshot.output_tokens_per_second > 0:
                break
        assert snapshot.admitted_requests == 1
        assert snapshot.waiting_requests == 0
        assert sum(one.running_requests for one in snapshot.devices[0].workers) == 1
        stream.cancel()
        for snapshot in snapshots:
            if not snapshot.admitted_requests:
                break
        assert (snapshot.running_jobs, snapshot.queued_jobs) == (0, 0)


def test_a_request_that_waits_for_a_slot_is_counted(service: Any) -> None:
    name = service.load_scripted("narrow", step_ms=5, max_running=1)
    streams = [start_stream(service, name), service.stream(name, "later")]
    with service.client.watch_runtime(0.1) as snapshots:
        for snapshot in snapshots:
            if snapshot.waiting_requests == 1:
                break
        assert snapshot.admitted_requests == 2
    for stream in streams:
        stream.cancel()


def test_snapshots_cannot_be_asked_for_too_often(service: Any) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        next(service.client.watch_runtime(0.01))
    assert [one.field for one in refusal.error.violations] == ["interval"]


def test_server_info_names_versions_and_limits(service: Any) -> None:
    info = service.client.info()
    assert info.version
    assert {"torch", "transformers", "bitsandbytes"} <= {one.name for one in info.libraries}
    assert info.limits.max_message_bytes == 16 << 20
    assert info.limits.max_admitted_requests == 256
    assert list(info.import_roots) == [str(service.sources)]
    assert not info.draining
    assert abs(info.start_time.ToSeconds() - time.time()) < 600
