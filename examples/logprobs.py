"""Show how sure a model is of each token: python examples/logprobs.py MODEL "prompt"."""

import math
import sys

from lowbit import Client

model, prompt = sys.argv[1:]
with Client() as client:
    for chunk in client.generate(model, prompt, max_tokens=16, temperature=0, logprobs=3):
        for chosen, top in zip(chunk.logprobs, chunk.top_logprobs, strict=True):
            best = {client.detokenize(model, [one]): f"{math.exp(top[one]):.1%}" for one in top}
            print(f"{chunk.text!r:12} {math.exp(chosen):.1%} of {best}")
