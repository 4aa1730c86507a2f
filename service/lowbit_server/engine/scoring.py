"""Scores the continuations of a prompt, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.engine.logprobs import token_logprobs
from lowbit_server.engine.request import Output, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.engine.request import Request


class Scoring:
    """What is known so far of one request's continuations.

    The logits after the prompt give the first token of each of them. For the others its
    tokens are run behind the prompt, but for the last one, which nothing follows.
    """

    def __init__(self, request: Request, logits: Tensor) -> None:
        """Take the logits (vocabulary,) float32 after the prompt."""
        self._request = request
        self._continuations = request.continuations
        firsts = [tokens[0] for tokens in self._continuations]
        self._firsts: list[float] = (logits[firsts] - logits.logsumexp(-1)).tolist()
        self._best = int(logits.argmax())
        self._index = -1
        self._found: list[TokenLogprob] = []
        self._greedy = True
        self._go_on()

    @property
    def done(self) -> bool:
        """Whether all continuations are scored."""
        return self._index == len(self._continuations)

    @property
    def position(self) -> int:
        """How many tokens of the present continuation were run."""
        return len(self._found) - 1

    @property
    def left(self) -> Sequence[int]:
        """Tokens of the present continuation that must still be run; empty: none."""
        return self._continuations[self._index][self.position : -1]

    def take(self, logits: Tensor) -> None:
        """Take the logits (tokens, vocabulary) after the first tokens of what is left."""
        first = len(self._found)
        tokens = self._continuations[self._index][first : first + len(logits)]
        self._found += token_logprobs(logits, tokens, [0] * len(tokens))
        self._greedy &= logits.argmax(-1).tolist() == list(tokens)

    def scores(self) -> list[Output]:
        """Return the scores that are complete, each once, and go on behind them."""
        outputs = []
        while not self.done and not self.left:
            outputs.append(
                Output(
                    self._request.id,
                    index=self._index,
                    logprobs=tuple(self._found),
                    greedy=self._greedy,
                )
            )
            self._go_on()
        return outputs

    def _go_on(self) -> None:
        self._index += 1
        if not self.done:
            self._found = [TokenLogprob(self._firsts[self._index])]
            self._greedy = self._continuations[self._index][0] == self._best
