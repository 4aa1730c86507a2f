"""What one output may still become; its masks are computed beside the step loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future

    from lowbit_server.grammar.matcher import Mask, Matcher


class Constraint:
    """The state of one output's constraint.

    The mask of the next position is begun as soon as a token is accepted, so that it is
    there when the forward pass is done.
    """

    def __init__(self, matcher: Matcher) -> None:
        """Begin where a matcher is, which stays there."""
        self._matcher = matcher.copy()
        self._pool = matcher.vocabulary.pool
        self.ends = matcher.vocabulary.ends
        self._next: Future[Mask] = self._pool.submit(self._matcher.mask)

    def mask(self) -> Mask:
        """Return what may come next; raise GrammarError when nothing may."""
        return self._next.result()

    def accept(self, token: int) -> None:
        """Go on to the next position; an error shows in its mask."""
        self._next = self._pool.submit(self._advance, token, self._next)

    def _advance(self, token: int, before: Future[Mask]) -> Mask:
        # It was begun earlier, so this waits for nothing that still has to be begun.
        before.result()
        self._matcher.accept(token)
        return self._matcher.mask()
