"""Starts worker processes. Tokens never pass through here."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path


class WorkerProcess(Protocol):
    """A started worker."""

    @property
    def address(self) -> str:
        """GRPC target of its private service."""

    @property
    def pid(self) -> int:
        """Operating-system process id."""

    def kill(self) -> None:
        """End it at once; does nothing when it has ended."""

    async def wait(self) -> int:
        """Wait for its end and return its exit code."""


class Launcher(Protocol):
    """Who starts workers."""

    async def launch(self, name: str, device: str) -> WorkerProcess:
        """Start the worker `name` on `device`; it may not serve yet when this returns."""


class LocalLauncher:
    """Starts workers as processes of this machine that end when this process ends."""

    def __init__(
        self, sockets: Path, *, threads: int, max_running: int, kv_cache_bytes: int
    ) -> None:
        """Put the workers' unix sockets into the folder `sockets`, made with mode 0700."""
        sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sockets = sockets
        self._flags = ["--threads", str(threads), "--max-running", str(max_running)]
        self._flags += ["--kv-cache-bytes", str(kv_cache_bytes)]

    async def launch(self, name: str, device: str) -> WorkerProcess:
        """Start the worker `name` on `device`."""
        socket = self._sockets / f"{name.replace('/', '-').replace(':', '-')}.sock"
        socket.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *["-m", "lowbit_server.worker", "--socket", str(socket), "--device", device],
            *self._flags,
            stdin=asyncio.subprocess.PIPE,  # its end tells the worker that we are gone
            stdout=asyncio.subprocess.DEVNULL,
        )
        return _LocalProcess(process, f"unix:{socket}")


class _LocalProcess:
    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        return await self._process.wait()
