"""`generate` of transformers."""

from __future__ import annotations

import time

import protocol
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each step's tokens come; the prompts come first."""

    def __init__(self) -> None:
        """Begin before the prompts."""
        self.times: list[float] = []
        self._prompts = True

    def put(self, value: object) -> None:  # noqa: ARG002  (the library's signature)
        """Take the next tokens."""
        if not self._prompts:
            self.times.append(time.perf_counter())
        self._prompts = False

    def end(self) -> None:
        """Do nothing."""


def make(folder: str) -> protocol.Run:
    """Load a folder."""
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    def run(prompts: protocol.Prompts, tokens: int) -> list[list[float]]:
        clock = Clock()
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            streamer=clock,
        )
        return [clock.times for _ in prompts]

    return run


if __name__ == "__main__":
    protocol.main(make)
