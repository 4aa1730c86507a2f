"""The text of one output: detokenized as it comes, cut at the first stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.tokenizer import Detokenizer


class OutputText:
    """Holds back text that may turn out to be the beginning of a stop string."""

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], min_tokens: int) -> None:
        """Look for `stops` in the text from token `min_tokens` on."""
        self._detokenizer = detokenizer
        self._stops = stops
        self._min_tokens = min_tokens
        self._held = ""
        self.tokens = 0
        """Tokens taken so far."""
        self.matched = ""
        """The stop string that was found; the text before it is all there is."""

    def echo(self, ids: Sequence[int]) -> str:
        """Take tokens of the prompt and return their text; stops are not looked for."""
        return self._detokenizer.push(ids)

    def push(self, ids: Sequence[int]) -> str:
        """Take new tokens and return the text that may be sent now."""
        if not self._stops:
            self.tokens += len(ids)
            return self._detokenizer.push(ids)
        sent = ""
        for token in ids:  # one at a time, so that usage ends with the matching token
            self.tokens += 1
            sent += self._cut(self._detokenizer.push((token,)))
            if self.matched:
                break
        return sent

    def flush(self) -> str:
        """Return what is left at the end of an output that no stop string ended."""
        rest = self._cut(self._detokenizer.flush())
        held, self._held = self._held, ""
        return rest + held

    def _cut(self, text: str) -> str:
        if self.tokens < self._min_tokens:
            return text
        text, self._held = self._held + text, ""
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # The earliest match; of two that begin together the longer one.
            at, self.matched = min(found, key=lambda match: (match[0], -len(match[1])))
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops) if self._stops else 0
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
