"""Leave a stream early; its slot is free at once: python examples/cancel.py MODEL."""

import asyncio
import sys

from lowbit import AsyncClient


async def main(model: str) -> None:
    """Read five chunks of a long answer."""
    async with AsyncClient() as client:
        async with client.generate(model, "Once upon a time", max_tokens=4000) as stream:
            for _ in range(5):
                print(await anext(stream), end="", flush=True)
        devices = await client.devices()
        print(f"\nrunning: {[worker.running_requests for worker in devices[0].workers]}")


asyncio.run(main(sys.argv[1]))
