"""Which rows hold blocks of the KV cache, and who gives theirs up when there are none left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.engine.rows import Row
from lowbit_server.models.decoder import BLOCK_TOKENS, blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowbit_server.engine.kv_cache import KvCache
    from lowbit_server.engine.request import Running
    from lowbit_server.engine.roster import Roster


class Residents:
    """The rows of the outputs that have slots.

    Outputs take blocks as they grow. When none are left, the one that got its slot last gives
    its own up and waits, first in the queue, to be computed again: what it made stays.
    """

    def __init__(self, kv: KvCache, roster: Roster) -> None:
        """Begin with none."""
        self.kv = kv
        self._roster = roster
        self.decoding: list[Row] = []
        """In the order in which they got their slots."""
        self.reading: list[Row] = []
        """Those whose prompts are read, or continued for scores; they have all blocks they need."""

    def to_read(self, now: float) -> Iterator[Row]:
        """Yield the rows to read in their order, and let the first of the queue be more of them.

        As long as there are slots and room for them.
        """
        yield from tuple(self.reading)
        while self._roster.admit(now, self._fits):
            yield self.reading[-1]

    def _fits(self, group: list[Running]) -> bool:
        row = Row(group, [], 0)
        request, running = row.request, row.running
        sequence = [*request.prompt, *running.tokens]
        if not request.deterministic and (running.prompt_told or not request.prompt_logprobs):
            # The last token is always read: its logits are needed.
            row.blocks = self.kv.find(request.cache_salt, sequence[:-1])
            row.length = len(row.blocks) * BLOCK_TOKENS
            if any(self._will_find(row, sequence, other) for other in self.reading):
                self.kv.give_back(row.blocks)
                return False
        scored = request.max_tokens if request.continuations else 0
        needed = blocks_of(len(sequence) + scored) - len(row.blocks)
        # A block for each that will grow beside it, or it would soon be preempted.
        beside = len(self.decoding) + sum(len(one.outputs) for one in self.reading)
        growth = len(group) + beside if beside else 0
        if needed + growth > self.kv.available:
            self.kv.give_back(row.blocks)
            return False
        row.blocks += self.kv.take(needed)
        for one in group:
            if not one.tokens:
                one.cached_tokens = row.length
        self.reading.append(row)
        return True

    @staticmethod
    def _will_find(row: Row, sequence: Sequence[int], other: Row) -> bool:
        """Return whether a sequence that waits for another's prompt will find more of it."""
        end = row.length + BLOCK_TOKENS
        prompt, salt = other.request.prompt, other.request.cache_salt
        same = salt == row.request.cache_salt and len(prompt) >= end
        return same and [*prompt[:end]] == [*sequence[:end]]

    def begin(self, row: Row) -> list[Row]:
        """Let each output of a prompt that was read decode; return their rows.

        They share what is whole of the prompt; those without room for the rest wait.
        """
        self.reading.remove(row)
        self._publish(row)
        first, *others = row.outputs
        row.outputs = [first]
        rows = [row, *filter(None, [self._fork(row, running) for running in others])]
        self.decoding += rows
        return rows

    def _fork(self, row: Row, running: Running) -> Row | None:
        whole = row.length // BLOCK_TOKENS
        shared, rest = row.blocks[:whole], blocks_of(row.length) - whole
        if rest > self.kv.available:
            self._roster.preempt(running)
            return None
        self.kv.hold(shared)
        own = self.kv.take(rest)
        if own:
            self.kv.copy(row.blocks[whole], own[0])
        return Row([running], [*shared, *own], row.length)

    def make_room(self) -> None:
        """Give every row a place for its next token; the last ones give theirs up for it."""
        for row in tuple(self.decoding):
            while row in self.decoding and not self.grow(row, row.length + 1):
                last = self.decoding.pop()
                self._release(last)
                self._roster.preempt(last.running)

    def grow(self, row: Row, length: int) -> bool:
        """Give a row blocks for so many tokens, or none when there are too few."""
        missing = blocks_of(length) - len(row.blocks)
        if missing > self.kv.available:
            return False
        if missing > 0:
            row.blocks += self.kv.take(missing)
        return True

    def wipe(self, row: Row) -> None:
        """Clear a row whose logits are not numbers."""
        self.kv.clear(row.blocks)
        row.length = 0

    def drop_ended(self) -> None:
        """Release the rows of outputs that have no slot any more."""
        live = set(self._roster.running)
        for row in tuple(self.reading):
            left = [running for running in row.outputs if running in live]
            if left:
                row.outputs = left
                continue
            if row.scoring is None:
                self.wipe(row)  # nobody has looked at its logits yet
            self._release(row)
            self.reading.remove(row)
        for row in [row for row in self.decoding if row.running not in live]:
            self._release(row)
            self.decoding.remove(row)

    def _release(self, row: Row) -> None:
        """Give up what a row holds; what it computed can be found again."""
        self._publish(row)
        self.kv.give_back(row.blocks)

    def _publish(self, row: Row) -> None:
        made = () if row.scoring else row.running.tokens
        known = [*row.request.prompt, *made][: row.length]
        self.kv.publish(row.request.cache_salt, known, row.blocks)
