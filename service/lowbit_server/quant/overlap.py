"""Finds text that two texts share, so that nothing is measured on what calibrated.

Two texts overlap when they share a run of 128 letters and digits, some 25 words of English,
however it is spaced, punctuated or capitalized; or when one that is shorter than such a run
is a part of the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUN_LETTERS = 128
"""Length of a shared run, letters and digits; a power of two."""
# Odd, so that products keep all 64 bits: the golden ratio's, as in Fibonacci hashing.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


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
