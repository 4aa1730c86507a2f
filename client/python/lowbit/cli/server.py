"""A server of the demo's own: started, waited for, stopped, never left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn, Self

_START_S = 120.0
_STOP_S = 60.0
_POLL_S = 0.05
_LOG_LINES = 20


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class DemoServer:
    """A `lowbit-server` process on a free loopback port.

    It is the leader of a session of its own, so that Ctrl-C reaches only the demo and
    so that a last kill takes its workers with it.
    """

    def __init__(self, home: Path, import_root: Path) -> None:
        """Say where the server keeps its files and where it may import from."""
        self._home = home
        self._import_root = import_root
        self._process: subprocess.Popen[bytes] | None = None
        self.log = home / "server.log"
        """Where the server's log goes."""

    def __enter__(self) -> Self:
        """Start the process."""
        address = self._home / "address"
        address.unlink(missing_ok=True)
        # The demo must not depend on how another server of this machine is configured.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LOWBIT_")}
        environment["LOWBIT_IMPORT_ROOTS"] = str(self._import_root)
        command = [find_server(), "--home", str(self._home), "--listen", "127.0.0.1:0"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process and its workers if `stop` has not ended it."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def address(self) -> str:
        """Wait until the server listens; return HOST:PORT.

        Raises:
            DemoError: when it ends or takes too long.

        """
        path = self._home / "address"
        deadline = time.monotonic() + _START_S
        while not path.exists():
            self.check()
            if time.monotonic() > deadline:
                self._fail(f"the server did not start in {_START_S:.0f} s")
            time.sleep(_POLL_S)
        return path.read_text(encoding="utf-8").strip()

    def check(self) -> None:
        """Raise DemoError when the process has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            self._fail(f"the server ended with code {self._process.returncode}")

    def stop(self) -> None:
        """Ask the server to drain and stop, and wait for it.

        Raises:
            DemoError: when it takes too long or does not exit with 0.

        """
        if self._process is None:
            return
        self._process.terminate()
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._fail(f"the server did not stop in {_STOP_S:.0f} s")
        if code != 0:
            self._fail(f"the server ended with code {code}")

    def _fail(self, text: str) -> NoReturn:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines[-_LOG_LINES:]:
            sys.stderr.write(f"{line}\n")
        message = f"{text}; its log is {self.log}"
        raise DemoError(message)


def find_server() -> str:
    """Return the path of `lowbit-server`, beside this Python or on PATH.

    Raises:
        DemoError: when it is not installed.

    """
    beside = Path(sys.executable).with_name("lowbit-server")
    found = str(beside) if beside.is_file() else shutil.which("lowbit-server")
    if found is None:
        message = "lowbit-server is not installed; install it beside this package"
        raise DemoError(message)
    return found
