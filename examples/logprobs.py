"""Show how likely each token of a prompt was, and how sure a model is of what follows.

python examples/logprobs.py MODEL "prompt"
"""

import math
import sys

from lowbit import Client

model, prompt = sys.argv[1:]
with Client() as client:
    for chunk in client.generate(
        model, prompt, max_tokens=16, temperature=0, logprobs=3, echo=True
    ):
        found = zip(chunk.token_ids, chunk.logprobs, chunk.top_logprobs, strict=True)
        for token, chosen, top in found:
            best = {client.detokenize(model, [one]): f"{math.exp(top[one]):.1%}" for one in top}
            likely = "first" if chosen is None else f"{math.exp(chosen):.1%} of {best}"
            print(f"{client.detokenize(model, [token])!r:12} {likely}")
