"""Greedy text, the same to the bit in any company: python examples/exact.py MODEL "prompt"."""

import sys

from lowbit import Client

model, prompt = sys.argv[1:]
with Client() as client:
    # Whoever else is served meanwhile, this one is computed alone and in the same steps.
    stream = client.generate(model, prompt, max_tokens=24, temperature=0, deterministic=True)
    print(stream.text())
    # Drafts of up to 8 tokens from the text itself, checked at once; the text does not change.
    for chunk in client.generate(
        model, prompt, max_tokens=24, temperature=0, prompt_lookup_tokens=8, token_ids_output=True
    ):
        print(f"{len(chunk.token_ids)}: {chunk.text!r}")
