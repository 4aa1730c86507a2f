"""A real worker process, attached to over its socket."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.unit.worker.harness import Front, WorkerProcess, write_scripted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerProcess]:
    """Yield a worker that serves; it is ended with the test."""
    socket = tmp_path / "worker.sock"
    command = [sys.executable, "-m", "lowbit_server.worker", "--socket", str(socket)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) as process:
        yield WorkerProcess(process, socket)
        process.kill()


@pytest.fixture
def front(worker: WorkerProcess) -> Iterator[Front]:
    """Yield a front that is attached and has seen the worker's first event."""
    with Front(worker.socket) as front:
        assert front.wait_for("ready").device == "cpu"
        yield front


@pytest.fixture
def load_scripted(front: Front, tmp_path: Path) -> Callable[..., str]:
    """Return a function that makes a scripted model live and returns its name."""

    def load(name: str = "scripted", **script: object) -> str:
        front.load(name, write_scripted(tmp_path / name, **script))
        assert front.wait_for("loaded").model == name
        return name

    return load
