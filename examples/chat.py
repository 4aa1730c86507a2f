"""Stream a chat answer: python examples/chat.py MODEL "question"."""

import sys

from lowbit import Client

model, question = sys.argv[1:]
with Client() as client:
    stream = client.generate(
        model, messages=[("user", question)], max_tokens=200, temperature=0.7, seed=1
    )
    for chunk in stream:
        print(chunk, end="", flush=True)
    print(f"\n{stream.usage}")
