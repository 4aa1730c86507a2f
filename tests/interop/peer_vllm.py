"""Writes the greedy continuation of a prompt by vLLM's CPU build, as token ids in JSON.

Runs in an environment of its own: FOLDER TOKENS.json COUNT, the output beside the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt


def main() -> None:
    """Run one folder."""
    folder, tokens, count = sys.argv[1:]
    model = LLM(model=folder, dtype="bfloat16", max_model_len=512, enforce_eager=True)
    prompt = TokensPrompt(prompt_token_ids=json.loads(Path(tokens).read_text()))
    sampling = SamplingParams(temperature=0, max_tokens=int(count), ignore_eos=True)
    made = list(model.generate(prompt, sampling)[0].outputs[0].token_ids)
    Path(folder).with_suffix(".greedy").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
