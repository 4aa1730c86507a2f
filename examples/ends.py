"""What ends an output: python examples/ends.py MODEL "prompt"."""

import sys

from lowbit import Client
from lowbit.v1.generation_pb2 import FinishReason

model, prompt = sys.argv[1:]
with Client() as client:
    ends = {
        "so many tokens": {"max_tokens": 8},
        "a string": {"max_tokens": 200, "stop": [".", "\n"]},
        "a string, but not at once": {"max_tokens": 200, "stop": [".", "\n"], "min_tokens": 20},
        "a time, whatever came until then": {"max_tokens": 2000, "time_limit": 0.5},
        "after the prompt itself": {"max_tokens": 8, "echo": True},
    }
    for name, settings in ends.items():
        stream = client.generate(model, prompt, temperature=0, ignore_eos=True, **settings)
        text = stream.text()
        reason = FinishReason.Name(stream.finish_reason).removeprefix("FINISH_REASON_")
        print(f"{name}: {text!r} ({reason}, {stream.usage.output_tokens} tokens)")
