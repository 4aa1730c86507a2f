"""Stop strings, however the tokens cut the text."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit_server.rpc.output import OutputText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.tokenizer import Detokenizer


class Words:
    """A detokenizer whose token `i` is the piece `i`."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._pieces[token] for token in ids)

    def flush(self) -> str:
        return self._rest


def output(pieces: Sequence[str], stops: Sequence[str], minimum: int = 0) -> OutputText:
    return OutputText(cast("Detokenizer", Words(pieces)), stops, minimum)


def run(text: OutputText, tokens: int, step: int = 1) -> str:
    """Take all tokens, `step` at a time, as the sender does."""
    sent = ""
    for begin in range(0, tokens, step):
        sent += text.push(range(begin, min(tokens, begin + step)))
        if text.matched:
            return sent
    return sent + text.flush()


letters = st.text("abc", max_size=30)
stop_strings = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(letters, stop_strings, st.lists(st.integers(0, 30), max_size=12), st.integers(1, 4))
def test_what_is_sent_is_the_text_before_the_first_stop(
    text: str, stops: list[str], cuts: list[int], step: int
) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    found = output(pieces, stops)
    sent = run(found, len(pieces), step)
    # A stop string is seen with the piece that completes it, so of two the one that is
    # complete in an earlier piece comes first, and in one piece the one that begins first.
    ends = [at for at in bounds[1:] if any(stop in text[:at] for stop in stops)]
    if not ends:
        assert (sent, found.matched) == (text, "")
        assert found.tokens == len(pieces)
        return
    seen = text[: ends[0]]
    at = min(seen.index(stop) for stop in stops if stop in seen)
    longest = max((stop for stop in stops if seen[at:].startswith(stop)), key=len)
    assert (sent, found.matched) == (text[:at], longest)
    assert found.tokens == bounds.index(ends[0])


@given(letters, stop_strings)
def test_nothing_of_a_stop_string_is_sent_before_it_is_decided(text: str, stops: list[str]) -> None:
    found = output(text, stops)
    sent = ""
    for token in range(len(text)):
        sent += found.push((token,))
        assert text.startswith(sent)
        if found.matched:
            break
        held = text[len(sent) : token + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_of_two_that_begin_together_the_longer_one_is_taken() -> None:
    found = output(["see <end> it"], ["<e", "<end>", "it"])
    assert run(found, 1) == "see "
    assert found.matched == "<end>"


def test_no_stop_string_is_looked_for_before_min_tokens() -> None:
    found = output("abcabc", ["c"], 4)
    assert run(found, 6) == "abcab"
    assert (found.matched, found.tokens) == ("c", 6)


def test_min_tokens_beyond_the_end_lets_everything_through() -> None:
    found = output("abcabc", ["c"], 7)
    assert run(found, 6) == "abcabc"
    assert not found.matched


@pytest.mark.parametrize(("stop", "text"), [("x\ufffd", ""), ("\ufffd\ufffd", "x\ufffd")])
def test_the_rest_of_a_broken_character_can_complete_a_stop_string(stop: str, text: str) -> None:
    found = OutputText(cast("Detokenizer", Words(["x"], "\ufffd")), [stop], 0)
    assert run(found, 1) == text
    assert found.matched == (stop if not text else "")
