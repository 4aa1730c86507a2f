# ruff: noqa: INP001, T201 - a script beside the package, not part of it
"""Read streams at the same time; print how many tokens came in how many seconds, as JSON.

python client/python/throughput.py ADDRESS MODEL STREAMS TOKENS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from lowbit import AsyncClient


async def main(address: str, model: str, streams: int, tokens: int) -> None:
    """Measure."""
    async with AsyncClient(address) as client:

        async def read(tokens: int) -> int:
            stream = client.generate(model, "measure", max_tokens=tokens, ignore_eos=True)
            async for _ in stream:
                pass
            return stream.usage.output_tokens if stream.usage else 0

        await read(1)  # connects
        began = time.perf_counter()
        counts = await asyncio.gather(*(read(tokens) for _ in range(streams)))
        print(json.dumps({"tokens": sum(counts), "seconds": time.perf_counter() - began}))


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
