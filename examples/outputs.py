"""Three answers from one reading of the prompt: python examples/outputs.py MODEL "prompt"."""

import sys

from lowbit import Client

model, prompt = sys.argv[1:]
with Client() as client:
    stream = client.generate(
        model, prompt, n=3, max_tokens=24, temperature=0.9, typical_p=0.95, seed=1
    )
    for text in stream.texts():
        print(repr(text))
    print(stream.usage)
