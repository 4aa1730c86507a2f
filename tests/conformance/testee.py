"""The runner's side of a testee: its process, its lines and the events of its calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

TESTEES = Path(__file__).parent / "testees"
BUILD_TIMEOUT_S = 1800.0
EVENT_TIMEOUT_S = 90.0
LAST = frozenset({"end", "error", "dropped"})


class TesteeError(Exception):
    """The testee broke the protocol or gave nothing in time."""


def languages() -> list[str]:
    """Return the languages that have a testee."""
    return sorted(path.parent.name for path in TESTEES.glob("*/testee.toml"))


class Testee:
    """One language's testee. The block's end ends it and checks its exit code."""

    __test__ = False  # its name looks like a test's to pytest

    def __init__(self, language: str, *, show: bool = False) -> None:
        self.language = language
        self._folder = TESTEES / language
        self._spec = tomllib.loads((self._folder / "testee.toml").read_text())
        self._show = show
        self._events: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self._changed = threading.Condition()
        self._broken = ""
        self._process: subprocess.Popen[str] | None = None
        self._stderr = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - it lives as long

    def missing(self) -> list[str]:
        """Return the programs that it needs and that are not on PATH."""
        return [name for name in self._spec["needs"] if shutil.which(name) is None]

    def build(self) -> None:
        """Run its build commands; raise TesteeError with the output of one that fails."""
        for command in self._spec.get("build", []):
            done = subprocess.run(
                command,
                cwd=self._folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=BUILD_TIMEOUT_S,
                check=False,
            )
            if done.returncode:
                raise TesteeError(f"{' '.join(command)} failed:\n{done.stdout[-8000:]}")

    def chat(self, address: str, model: str, question: str) -> str:
        """Return what the SDK's example of a chat prints; raise TesteeError when it fails."""
        done = subprocess.run(
            [*self._command("chat"), model, question],
            cwd=self._folder,
            env=os.environ | {"LOWBIT_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=EVENT_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise TesteeError(f"its chat ended with exit code {done.returncode}:\n{done.stderr}")
        return done.stdout

    def _command(self, name: str) -> list[str]:
        return [sys.executable if one == "$python" else one for one in self._spec[name]]

    def __enter__(self) -> Self:
        """Start it."""
        self._process = subprocess.Popen(
            self._command("run"),
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Close its input and wait for its end; kill it if that does not come."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        with self._stderr, self._process:  # closes its output
            try:
                code = self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                raise TesteeError("it did not end with its input") from None
            if code:
                raise TesteeError(f"it ended with exit code {code}:\n{self.stderr()[-4000:]}")

    def send(self, line: dict[str, Any]) -> None:
        """Write a line to it."""
        assert self._process is not None
        assert self._process.stdin is not None
        text = json.dumps(line, ensure_ascii=False)
        if self._show:
            sys.stderr.write(f"  > {text[:2000]}\n")
        try:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise TesteeError(f"it is gone:\n{self.stderr()[-4000:]}") from error

    def stderr(self) -> str:
        """Return what it wrote on standard error."""
        return Path(self._stderr.name).read_text()  # not by its own handle, which it writes to

    def events(self, id_: int) -> list[dict[str, Any]]:
        """Return the events of a call so far."""
        with self._changed:
            return list(self._events[id_])

    def wait(
        self, id_: int, reached: Callable[[list[dict[str, Any]]], Any], what: str
    ) -> list[dict[str, Any]]:
        """Wait until the events of a call satisfy `reached`, and return them."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._broken or reached(self._events[id_]), EVENT_TIMEOUT_S
            )
            events = list(self._events[id_])
        if self._broken:
            raise TesteeError(f"{self._broken}\n{self.stderr()[-4000:]}")
        if not came:
            raise TesteeError(f"no {what} in {EVENT_TIMEOUT_S:g} s; last {events[-3:]}")
        return events

    def last(self, id_: int) -> list[dict[str, Any]]:
        """Wait for the last event of a call and return all."""
        return self.wait(id_, lambda events: events and events[-1]["event"] in LAST, "last event")

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if self._show:
                sys.stderr.write(f"  < {line[:2000].rstrip()}\n")
            try:
                event = json.loads(line)
                id_, kind = event["id"], event["event"]
            except (ValueError, KeyError, TypeError):
                self._break(f"no event of a call: {line[:500]!r}")
                return
            with self._changed:
                events = self._events[id_]
                if events and events[-1]["event"] in LAST:
                    self._broken = f"call {id_} gave {kind} after {events[-1]['event']}"
                events.append(event)
                self._changed.notify_all()
        self._break("it closed its output")

    def _break(self, why: str) -> None:
        with self._changed:
            self._broken = self._broken or why
            self._changed.notify_all()
