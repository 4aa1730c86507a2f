"""What comes over a worker's socket, as the step loop finds it; no loop runs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lowbit.worker.v1 import worker_pb2 as pb
from lowbit_server.worker.inbox import Attached, Inbox, Submission
from lowbit_server.worker.service import serve
from tests.unit.worker.harness import DEADLINE_S, Front

if TYPE_CHECKING:
    from pathlib import Path


def test_a_request_interrupts_the_step_that_is_under_way(tmp_path: Path) -> None:
    inbox = Inbox()
    server = serve(str(tmp_path / "worker.sock"), inbox)
    with Front(tmp_path / "worker.sock") as front:
        assert isinstance(inbox.get(timeout=DEADLINE_S), Attached)
        front.ping()
        assert isinstance(inbox.get(timeout=DEADLINE_S), pb.Ping)
        assert not inbox.interrupt.value
        front.submit("model", [1], max_tokens=1)
        assert isinstance(inbox.get(timeout=DEADLINE_S), Submission)
        ends = time.monotonic() + DEADLINE_S
        while not inbox.interrupt.value:
            assert time.monotonic() < ends
    server.stop(None).wait()
