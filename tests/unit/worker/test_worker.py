"""The worker process over its real socket, with the scripted engine."""

from __future__ import annotations

import signal
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import grpc
import pytest

from lowbit.v1.generation_pb2 import FinishReason
from lowbit.v1.model_pb2 import LoadPhase
from tests.unit.worker.harness import DEADLINE_S, Front, write_scripted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.worker.harness import WorkerProcess

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


def test_a_scripted_exit_ends_the_process(
    worker: WorkerProcess, front: Front, load_scripted: Load
) -> None:
    model = load_scripted(step_ms=1, faults=[{"kind": "exit", "after_tokens": 3}])
    request = front.submit(model, [1], max_tokens=9)
    with pytest.raises(grpc.RpcError):
        front.finished(request)
    assert worker.process.wait(DEADLINE_S) == 1


def test_a_scripted_hang_leaves_pings_unanswered(worker: WorkerProcess, tmp_path: Path) -> None:
    with Front(worker.socket, deadline_s=3) as front:
        front.wait_for("ready")
        fault = {"kind": "hang", "after_tokens": 1}
        front.load("hangs", write_scripted(tmp_path / "hangs", step_ms=1, faults=[fault]))
        front.wait_for("loaded")
        front.submit("hangs", [1], max_tokens=9)
        with pytest.raises(grpc.RpcError) as caught:
            ping_for_ever(front)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(DEADLINE_S) == 0


def test_load_reports_its_phases_in_order(front: Front, tmp_path: Path) -> None:
    front.load("scripted", write_scripted(tmp_path / "scripted", load_ms=3))
    phases = []
    while (event := front.next_event()).WhichOneof("event") == "load_progress":
        phases.append(event.load_progress.phase)
    assert event.loaded.model == "scripted"
    assert phases == sorted(phases)
    assert set(phases) == {
        LoadPhase.LOAD_PHASE_READ,
        LoadPhase.LOAD_PHASE_PLACE,
        LoadPhase.LOAD_PHASE_WARM_UP,
    }


def test_a_live_model_is_loaded_at_once(front: Front, load_scripted: Load, tmp_path: Path) -> None:
    model = load_scripted()
    front.load(model, tmp_path / model)
    assert front.next_event().loaded.model == model


def test_requests_go_on_while_another_model_loads(
    front: Front, load_scripted: Load, tmp_path: Path
) -> None:
    model = load_scripted(step_ms=1)
    front.load("slow", write_scripted(tmp_path / "slow", load_ms=60_000))
    front.wait_for("load_progress")
    assert len(front.finished(front.submit(model, [1], max_tokens=20)).tokens) == 20


def test_unload_stops_a_load(front: Front, tmp_path: Path) -> None:
    folder = write_scripted(tmp_path / "slow", load_ms=600_000)
    front.load("slow", folder)
    front.wait_for("load_progress")
    front.unload("slow")
    assert front.wait_for("unloaded").model == "slow"
    # The loader is free again: the load did not run to its end.
    front.load("quick", write_scripted(tmp_path / "quick"))
    assert front.wait_for("loaded").model == "quick"


def test_two_models_take_turns(front: Front, load_scripted: Load) -> None:
    one, two = load_scripted("one", step_ms=0), load_scripted("two", step_ms=0)
    requests = [front.submit(model, [1], max_tokens=1500) for model in (one, two)]
    while not any(front.results[request].ends for request in requests):
        front.next_event()
    # The second began a little later, but did not wait for the first to end.
    assert all(len(front.results[request].tokens) > 300 for request in requests)
    for request in requests:
        front.finished(request)


def test_unload_cancels_the_requests_of_its_model_only(front: Front, load_scripted: Load) -> None:
    gone, stays = load_scripted("gone", step_ms=1), load_scripted("stays", step_ms=1)
    lost, kept = front.submit(gone, [1], max_tokens=2000), front.submit(stays, [1], max_tokens=50)
    front.produced(lost, 1)
    front.unload(gone)
    assert front.wait_for("unloaded").model == gone
    assert front.results[lost].finish == FinishReason.FINISH_REASON_CANCELLED
    assert len(front.finished(kept).tokens) == 50
    assert front.finished(front.submit(gone, [1], max_tokens=1)).error


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"faults": [{"kind": "load_error"}]}, "scripted load error"),
        ({"step_ms": -1}, "step_ms"),
        ({"speed": 3}, "speed"),
    ],
)
def test_a_load_that_fails_says_why(
    front: Front, tmp_path: Path, script: dict[str, object], message: str
) -> None:
    front.load("bad", write_scripted(tmp_path / "bad", **script))
    failed = front.wait_for("load_failed")
    assert failed.model == "bad"
    assert message in failed.message
    assert not failed.out_of_memory


def test_a_folder_that_is_not_there_fails_the_load(front: Front, tmp_path: Path) -> None:
    front.load("none", tmp_path / "none")
    assert "FileNotFoundError" in front.wait_for("load_failed").message


def test_a_pong_tells_of_memory_and_models(front: Front, load_scripted: Load) -> None:
    model = load_scripted()
    front.ping()
    pong = front.wait_for("pong")
    assert 0 < pong.resident_bytes < pong.total_bytes
    assert 0 < pong.free_bytes < pong.total_bytes
    assert [(use.model, use.kv_bytes) for use in pong.kv] == [(model, 0)]


def test_a_second_front_is_refused(worker: WorkerProcess, front: Front) -> None:
    with Front(worker.socket) as second, pytest.raises(grpc.RpcError) as caught:
        second.next_event()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_new_front_finds_the_models_and_no_requests(
    worker: WorkerProcess, tmp_path: Path
) -> None:
    folder = write_scripted(tmp_path / "scripted", step_ms=1)
    with Front(worker.socket) as front:
        front.load("scripted", folder)
        front.wait_for("loaded")
        front.produced(front.submit("scripted", [1], max_tokens=2000), 1)
    with attached_again(worker) as front:
        ended = front.finished(front.submit("scripted", [2], max_tokens=5))
        assert ended.tokens == [2] * 5
        assert {output.request for step in front.steps for output in step.outputs} == {1}
        assert max(step.running for step in front.steps) == 1


def test_the_process_ends_with_its_stdin(worker: WorkerProcess, front: Front) -> None:
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(DEADLINE_S) == 0


def test_the_process_ends_on_sigterm(worker: WorkerProcess, front: Front) -> None:
    worker.process.terminate()
    assert worker.process.wait(DEADLINE_S) == -signal.SIGTERM


def test_only_the_owner_may_open_the_socket(worker: WorkerProcess, front: Front) -> None:
    assert stat.S_IMODE(worker.socket.stat().st_mode) == 0o600


def ping_for_ever(front: Front) -> NoReturn:
    while True:
        front.ping()
        front.wait_for("pong")


@contextmanager
def attached_again(worker: WorkerProcess) -> Iterator[Front]:
    """Attach as soon as the worker has noticed that its first front is gone."""
    while True:
        with Front(worker.socket) as front:
            try:
                front.wait_for("ready")
            except grpc.RpcError:
                continue
            yield front
            return
