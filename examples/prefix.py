"""Ask twice about one document, which is read once: python examples/prefix.py MODEL FILE Q Q."""

import sys
from pathlib import Path

from lowbit import Client

model, file, *questions = sys.argv[1:]
document = Path(file).read_text(encoding="utf-8")
with Client() as client:
    for question in questions:
        messages = [("system", document), ("user", question)]
        # Only who gives the same salt finds what this one read.
        stream = client.generate(model, messages=messages, max_tokens=24, cache_salt="desk 7")
        print(stream.text())
        print(f"{stream.usage.cached_tokens} of {stream.usage.prompt_tokens} tokens were there")
