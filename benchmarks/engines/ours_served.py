"""The same engine behind a server, read by the Python SDK over gRPC on loopback."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import protocol

from lowbit import AsyncClient, Client
from lowbit_server.testing import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST = "lowbit.json"


def main() -> None:
    """Serve a folder of the store while the plan is run."""
    with tempfile.TemporaryDirectory() as home:

        def make(folder: str) -> protocol.Run:
            name = json.loads(Path(folder, MANIFEST).read_text())["name"]
            models = Path(home, "models")
            models.mkdir()
            # Links to files, as a store has no links to folders.
            (models / name).mkdir()
            for file in Path(folder).iterdir():
                os.link(file.resolve(), models / name / file.name)
            server.start()
            with Client(server.address) as client:
                client.load(name).wait()
            return lambda prompts, tokens: asyncio.run(_run(server.address, name, prompts, tokens))

        server = ServerProcess(Path(home))
        protocol.main(make, server.kill)


_runs = itertools.count()


async def _run(
    address: str, model: str, prompts: protocol.Prompts, tokens: int
) -> list[list[float]]:
    salt = str(next(_runs))
    async with AsyncClient(address) as client:

        async def one(prompt: Sequence[int]) -> list[float]:
            stream = client.generate(
                model,
                token_ids=prompt,
                max_tokens=tokens,
                temperature=0,
                ignore_eos=True,
                token_ids_output=True,
                # Nothing is found that an earlier run has left.
                cache_salt=salt,
            )
            arrivals: list[float] = []
            async for chunk in stream:
                arrivals += [time.perf_counter()] * len(chunk.token_ids)
            return arrivals

        return list(await asyncio.gather(*map(one, prompts)))


if __name__ == "__main__":
    main()
