"""Finds text that two texts share, so that nothing is measured on what calibrated.

Two texts overlap when they share a run of 128 letters and digits, some 25 words of English,
however it is spaced, punctuated or capitalized; or when one that is shorter than such a run
is a part of the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RUN_LETTERS = 128
"""Length of a shared run, letters and digits; a power of two."""
# Odd, so that products keep all 64 bits: the golden ratio's, as in Fibonacci hashing.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
# Enough for a text of two million letters, from which 128 samples of 512 tokens are drawn,
# to give itself away by any 3000 of its letters: one run of 500 is remembered.
_SKETCHED_RUNS = 4096


def letters(text: str) -> str:
    """Return the letters and digits of a text in lower case: what is compared."""
    return "".join(filter(str.isalnum, text.casefold()))


def shared_starts(one: str, other: str) -> NDArray[np.int64]:
    """Return where runs begin in `one` that `other` has too; both are `letters`."""
    shared = np.isin(_hashes(one), _hashes(other))
    return np.flatnonzero(shared)


def shared_run(one: str, other: str) -> str | None:
    """Return an example of what two texts share, as `letters`; None when they do not overlap."""
    first, second = letters(one), letters(other)
    shorter, longer = sorted((first, second), key=len)
    if len(shorter) < RUN_LETTERS:
        return shorter if shorter and shorter in longer else None
    starts = shared_starts(first, second)
    return first[starts[0] : starts[0] + RUN_LETTERS] if len(starts) else None


def sketch(text: str) -> list[int]:
    """Return what to remember of a text: the smallest hashes of its runs, in order.

    A text of at most `_SKETCHED_RUNS` runs is remembered whole, a longer one by chance.
    """
    smallest: list[int] = np.unique(_mixed(letters(text)))[:_SKETCHED_RUNS].tolist()
    return smallest


def sketched_run(text: str, remembered: Sequence[int]) -> str | None:
    """Return an example of what a text shares with one of which a sketch is left, or None."""
    own = letters(text)
    starts = np.flatnonzero(np.isin(_mixed(own), np.array(remembered, np.uint64)))
    return own[starts[0] : starts[0] + RUN_LETTERS] if len(starts) else None


def _mixed(text: str) -> NDArray[np.uint64]:
    """Return hashes whose order has nothing to do with the runs: high bits hold all others."""
    return _hashes(text) * _MULTIPLIER


def _hashes(text: str) -> NDArray[np.uint64]:
    """Return a hash of each run of a text: a polynomial of its characters modulo 2^64.

    The hash of a run of 2k characters is made of those of its halves, so that all of them
    take seven passes.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes = codes.astype(np.uint64)
    if len(hashes) < RUN_LETTERS:
        return hashes[:0]
    half, factor = 1, _MULTIPLIER
    with np.errstate(over="ignore"):
        while half < RUN_LETTERS:
            hashes = hashes[:-half] + factor * hashes[half:]
            half, factor = 2 * half, factor * factor
    return hashes
