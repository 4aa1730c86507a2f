"""Leave a stream early; its slot is free at once: python examples/cancel.py MODEL."""

import asyncio
import sys

from lowbit import AsyncClient


async def main(model: str) -> None:
    """Read five chunks of a long answer."""
    async with (
        AsyncClient() as client,
        client.generate(model, "Once upon a time", max_tokens=4000) as stream,
    ):
        for _ in range(5):
            print(await anext(stream), end="", flush=True)
    print("\nleft early")


asyncio.run(main(sys.argv[1]))
