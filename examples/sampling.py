"""The same prompt, sampled in several ways: python examples/sampling.py MODEL "prompt"."""

import sys

from lowbit import Client

model, prompt = sys.argv[1:]
with Client() as client:
    word = client.tokenize(model, " the", add_special_tokens=False).token_ids

    ways = {
        "greedy": {"temperature": 0},
        "warm, likely tokens only": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 1},
        "hot, none far from the best": {"temperature": 1.5, "min_p": 0.1, "seed": 1},
        "typical": {"temperature": 1.0, "typical_p": 0.9, "seed": 1},
        "without repeating itself": {
            "temperature": 0,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
        },
        "never ' the'": {"temperature": 0, "bad_words": [word]},
        "rarely ' the'": {"temperature": 0, "logit_bias": dict.fromkeys(word, -2.0)},
    }
    for name, settings in ways.items():
        print(f"{name}: {client.generate(model, prompt, max_tokens=24, **settings).text()!r}")
