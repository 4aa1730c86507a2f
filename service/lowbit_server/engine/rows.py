"""What holds blocks of the KV cache: outputs that decode, and a prompt that is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.engine.request import Request, Running
    from lowbit_server.engine.scoring import Scoring


@dataclass(slots=True, eq=False)
class Row:
    """A sequence of tokens; its first `length` ones are in its blocks of the KV cache."""

    outputs: list[Running]
    """Those that have not ended yet: one that decodes, or all that wait for their prompt."""
    blocks: list[int]
    length: int
    scoring: Scoring | None = None
    """Set once the prompt of a request with continuations is read."""
    scored_chunks: int = 0

    @property
    def running(self) -> Running:
        """The first output."""
        return self.outputs[0]

    @property
    def request(self) -> Request:
        """The request of all outputs."""
        return self.running.request

    @property
    def known(self) -> int:
        """Number of tokens of the prompt and of what was made."""
        return len(self.request.prompt) + len(self.running.tokens)

    @property
    def tells(self) -> bool:
        """Whether the prompt's log-probabilities are asked for and were not told yet."""
        return self.request.prompt_logprobs and not self.running.prompt_told

    def next_tokens(self, count: int) -> Sequence[int]:
        """Return up to `count` known tokens that are not in the cache yet.

        They do not reach from the prompt into what was made: after a preemption these come
        again as they came first.
        """
        prompt = self.request.prompt
        if self.length < len(prompt):
            return prompt[self.length : self.length + count]
        made = self.length - len(prompt)
        return self.running.tokens[made : made + count]
