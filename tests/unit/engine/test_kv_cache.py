from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from lowbit_server.engine.kv_cache import KvCache
from lowbit_server.models.decoder import BLOCK_TOKENS
from tests.unit.engine.counting import CountingModel

SPEC = CountingModel().spec
BLOCK = SPEC.token_bytes * BLOCK_TOKENS
SALT = b"someone"


def cache(blocks: int) -> KvCache:
    return KvCache(SPEC, blocks * BLOCK)


def tokens(blocks: int, extra: int = 0) -> list[int]:
    return [index % 90 for index in range(blocks * BLOCK_TOKENS + extra)]


def test_bytes_of_a_token() -> None:
    # One head of 1 + 2 and two heads of 1 + 1 floats.
    assert SPEC.token_bytes == 7 * 4


def test_a_budget_is_cut_into_whole_blocks() -> None:
    kv = KvCache(SPEC, 3 * BLOCK + 5)
    assert kv.blocks == kv.available == 3
    assert kv.held_bytes == 0
    assert [len(tensor) for tensor in (*kv.keys, *kv.values)] == [3] * 4


def test_taken_blocks_are_zero_and_given_back_ones_are_taken_again() -> None:
    kv = cache(3)
    taken = kv.take(3)
    assert sorted(taken) == [0, 1, 2]
    assert not any(tensor.any() for tensor in (*kv.keys, *kv.values))
    assert kv.available == 0
    assert kv.held_bytes == 3 * BLOCK
    kv.give_back(taken[1:])
    assert kv.available == 2
    assert sorted(kv.take(2)) == sorted(taken[1:])


def test_only_whole_blocks_with_the_same_beginning_and_salt_are_found() -> None:
    kv = cache(8)
    first = kv.take(3)
    kv.publish(SALT, tokens(2, 5), first)
    assert kv.find(SALT, tokens(2, 5)) == first[:2]
    assert kv.find(SALT, tokens(5)) == first[:2]
    assert kv.find(SALT, tokens(1, 31)) == first[:1]
    assert kv.find(SALT, tokens(0, 31)) == []
    assert kv.find(b"another", tokens(2)) == []
    assert kv.find(SALT, [89, *tokens(2)[1:]]) == []


def test_what_nobody_holds_stays_until_room_is_needed() -> None:
    kv = cache(4)
    old, new = kv.take(2), kv.take(2)
    kv.publish(SALT, tokens(2), old)
    kv.publish(b"other", tokens(2), new)
    kv.give_back(old)
    kv.give_back(new)
    assert kv.available == 4
    # Of the sequence that was used longest ago, its end.
    assert kv.take(1) == old[1:]
    assert kv.find(SALT, tokens(2)) == old[:1]
    assert kv.find(b"other", tokens(2)) == new
    assert kv.available == 0


def test_using_a_sequence_again_keeps_it() -> None:
    kv = cache(2)
    first, second = kv.take(1), kv.take(1)
    kv.publish(SALT, tokens(1), first)
    kv.publish(b"other", tokens(1), second)
    kv.give_back(first)
    kv.give_back(second)
    kv.give_back(kv.find(SALT, tokens(1)))
    assert kv.take(1) == second


def test_a_block_lives_as_long_as_its_last_holder() -> None:
    kv = cache(1)
    (block,) = kv.take(1)
    kv.hold([block])
    kv.give_back([block])
    assert kv.available == 0
    kv.give_back([block])
    assert kv.available == 1


def test_the_same_tokens_are_kept_once() -> None:
    kv = cache(2)
    first, second = kv.take(1), kv.take(1)
    kv.publish(SALT, tokens(1), first)
    kv.publish(SALT, tokens(1), second)
    kv.give_back(second)
    assert kv.take(1) == second
    assert kv.find(SALT, tokens(1)) == first


def test_a_block_is_copied_in_all_layers() -> None:
    kv = cache(2)
    source, target = kv.take(2)
    for number, pool in enumerate((*kv.keys, *kv.values)):
        pool[source] = float(number)
    kv.copy(source, target)
    for number, pool in enumerate((*kv.keys, *kv.values)):
        assert pool[target].unique().tolist() == [number]


def test_what_is_shared_or_can_be_found_is_not_cleared() -> None:
    kv = cache(3)
    blocks = kv.take(3)
    kv.publish(SALT, tokens(1), blocks)
    kv.hold(blocks[1:2])
    for pool in (*kv.keys, *kv.values):
        pool[:] = torch.nan
    kv.clear(blocks)
    for pool in (*kv.keys, *kv.values):
        assert pool[blocks].isnan().flatten(1).any(1).tolist() == [True, True, False]


class Holders(RuleBasedStateMachine):
    """Sequences come and go; the books are kept beside the cache's own."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.kv = cache(6)
        self.sequences: list[list[int]] = []

    @rule(target=held, count=st.integers(0, 6))
    def take(self, count: int) -> list[int] | None:
        if count > self.kv.available:
            return None
        return self._begin(self.kv.take(count))

    @rule(target=held, length=st.integers(0, 4 * BLOCK_TOKENS), salt=st.sampled_from([b"a", b"b"]))
    def find(self, length: int, salt: bytes) -> list[int] | None:
        return self._begin(self.kv.find(salt, tokens(0, length)))

    @rule(blocks=held, salt=st.sampled_from([b"a", b"b"]))
    def publish(self, blocks: list[int] | None, salt: bytes) -> None:
        if blocks in self.sequences:
            self.kv.publish(salt, tokens(len(blocks)), blocks)

    @rule(blocks=held)
    def give_back(self, blocks: list[int] | None) -> None:
        if (place := self._place(blocks)) is not None:
            self.kv.give_back(self.sequences.pop(place))

    @invariant()
    def no_block_is_lost_or_given_twice(self) -> None:
        used = {block for blocks in self.sequences for block in blocks}
        assert self.kv.available == 6 - len(used)

    def _begin(self, blocks: list[int]) -> list[int]:
        taken_before = {block for held in self.sequences for block in held}
        self.sequences.append(blocks)
        assert len(set(blocks)) == len(blocks)
        assert taken_before <= set(range(6))
        return blocks

    def _place(self, blocks: list[int] | None) -> int | None:
        places = [place for place, one in enumerate(self.sequences) if one is blocks]
        return places[0] if places else None


TestHolders = Holders.TestCase
TestHolders.settings = settings(deadline=None, max_examples=60)


def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache(2)
