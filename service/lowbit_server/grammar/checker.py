"""The front's side of checking grammars: a process that may die of them, and its answers."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import OrderedDict
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from pathlib import Path

    from lowbit_server.grammar.spec import Grammar
    from lowbit_server.store.manifest import Manifest

CHECK_S = 2.0
"""Longest time that a grammar may take to be prepared."""
START_S = 60.0
"""Longest time that the process may take to start and to read a tokenizer."""
ANSWERS = 1024
"""Answers kept, some hundred bytes each."""
CHOICE_BYTES = 1 << 20
"""Longest list of choices, as much as the other kinds may have."""


class GrammarChecker:
    """Says whether a grammar can be used with a model; one at a time, the known ones at once.

    A client that goes away does not stop a check: others may want its answer.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: Process | None = None
        # One check at a time. Who waits here holds a place in the admission queue, and
        # that is bounded.
        self._turn = asyncio.Lock()
        self._answers: OrderedDict[bytes, str] = OrderedDict()
        self._checks: set[asyncio.Task[str]] = set()

    async def check(self, grammar: Grammar, manifest: Manifest, folder: Path) -> None:
        """Raise INVALID_FIELD for a grammar that a model's worker could not follow."""
        field = f"constraint.{grammar.kind}"
        if grammar.kind == "choice" and len(grammar.text.encode()) > CHOICE_BYTES:
            raise invalid(field, f"the options take more than {CHOICE_BYTES} bytes in all")
        request = {
            "folder": str(folder),
            "revision": manifest.revision,
            "size": manifest.vocab_size,
            "ends": manifest.eos_token_ids,
            "kind": grammar.kind,
            "text": grammar.text,
        }
        line = json.dumps(request).encode()
        task = asyncio.create_task(self._answer(sha256(line).digest(), line))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)
        if answer := await asyncio.shield(task):
            raise invalid(field, answer)

    async def stop(self) -> None:
        """End the process."""
        for task in self._checks:
            task.cancel()
        await self._kill()

    async def _answer(self, key: bytes, line: bytes) -> str:
        if key not in self._answers:
            async with self._turn:
                if key not in self._answers:  # of many that are equal one is checked
                    self._answers[key] = await self._ask(line)
        answer = self._answers[key]
        self._answers.move_to_end(key)
        if len(self._answers) > ANSWERS:
            self._answers.popitem(last=False)
        return answer

    async def _ask(self, line: bytes) -> str:
        """Return what the process finds; its death or silence is an answer as well."""
        try:
            async with asyncio.timeout(START_S):
                process = await self._started()
                assert process.stdin is not None  # noqa: S101
                assert process.stdout is not None  # noqa: S101
                process.stdin.write(line + b"\n")
                await process.stdin.drain()
                await process.stdout.readuntil(b"\n")
        except (OSError, EOFError, TimeoutError) as error:
            await self._kill()
            message = "the process that checks grammars did not start"
            raise LowbitError(Reason.INTERNAL, message) from error
        try:
            async with asyncio.timeout(CHECK_S):
                answer = await process.stdout.readline()
        except TimeoutError:
            await self._kill()
            return f"it takes more than {CHECK_S:.0f} s to prepare; make it simpler"
        if not answer:
            await self._kill()
            return "it is nested too deeply, or takes more than 256 MiB to prepare"
        found: str = json.loads(answer)
        return found

    async def _started(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "lowbit_server.grammar"],
                stdin=asyncio.subprocess.PIPE,  # its end tells the process that we are gone
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,  # parts of grammars, and they are secret
            )
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
