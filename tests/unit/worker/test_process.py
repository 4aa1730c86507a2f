"""How a worker process begins, ends and changes its front."""

from __future__ import annotations

import signal
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import grpc
import pytest

from tests.unit.worker.harness import DEADLINE_S, Front, write_scripted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.worker.harness import WorkerProcess

    Load = Callable[..., str]


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
