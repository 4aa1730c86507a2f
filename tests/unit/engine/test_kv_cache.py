from __future__ import annotations

import pytest
import torch

from lowbit_server.engine.kv_cache import BLOCK_TOKENS, KvCache
from tests.unit.engine.counting import CountingModel

SPEC = CountingModel().spec
TOKEN = SPEC.token_bytes


def cache(tokens: int) -> KvCache:
    return KvCache(SPEC, tokens * TOKEN)


def fill(kv: KvCache, row: int, value: float, length: int) -> None:
    for side in kv.view(row, 1):
        for tensor in side:
            tensor[:, :, :length] = value


def stored(kv: KvCache, row: int, length: int) -> set[float]:
    return {
        number
        for side in kv.view(row, 1)
        for tensor in side
        for number in tensor[:, :, :length].flatten().tolist()
    }


def test_bytes_of_a_token() -> None:
    # One head of 1 + 2 and two heads of 1 + 1 floats.
    assert TOKEN == 7 * 4


def test_growing_keeps_what_is_stored() -> None:
    kv = cache(100_000)
    kv.reserve(1, 10, [10])
    fill(kv, 0, 3.0, 10)
    kv.reserve(2, 10, [300, 10])
    fill(kv, 1, 4.0, 10)
    kv.reserve(5, 300, [300] * 5)
    assert stored(kv, 0, 10) == {3.0}
    assert stored(kv, 1, 10) == {4.0}
    assert stored(kv, 4, 300) == {0.0}


def test_sizes_double_within_what_rows_may_come_to() -> None:
    kv = cache(1_000_000)
    kv.reserve(3, 10, [2000] * 3)
    assert kv.bytes == 3 * BLOCK_TOKENS * TOKEN
    kv.reserve(4, BLOCK_TOKENS + 1, [2000] * 4)
    assert kv.bytes == 6 * 2 * BLOCK_TOKENS * TOKEN
    kv.reserve(4, 1800, [2000] * 4)
    assert kv.bytes == 6 * 2048 * TOKEN


def test_doubling_stops_at_the_budget() -> None:
    kv = cache(5 * BLOCK_TOKENS)
    kv.reserve(3, 10, [10] * 3)
    kv.reserve(4, 10, [10] * 4)
    assert kv.bytes == 5 * BLOCK_TOKENS * TOKEN


def test_a_long_capacity_shrinks_for_many_short_rows() -> None:
    kv = cache(8 * BLOCK_TOKENS)
    kv.reserve(1, 8 * BLOCK_TOKENS, [8 * BLOCK_TOKENS])
    kv.reserve(5, 10, [10] * 5)
    assert kv.bytes <= 8 * BLOCK_TOKENS * TOKEN
    assert kv.view(4, 1)[0][0].shape == (1, 1, BLOCK_TOKENS, 1)


def test_fits_counts_all_rows_at_the_longest() -> None:
    kv = cache(8 * BLOCK_TOKENS)
    assert kv.row_limit_tokens(1) == 8 * BLOCK_TOKENS
    assert kv.row_limit_tokens(3) == 2 * BLOCK_TOKENS
    assert kv.row_limit_tokens(9) == 0
    assert kv.fits([BLOCK_TOKENS] * 8)
    assert not kv.fits([1] * 9)
    assert kv.fits([2 * BLOCK_TOKENS, 1, 1, 1])
    assert not kv.fits([2 * BLOCK_TOKENS + 1, 1, 1])


def test_a_row_is_copied_as_a_whole() -> None:
    kv = cache(100_000)
    kv.reserve(3, 20, [20] * 3)
    for row in range(3):
        fill(kv, row, row + 1.0, 20)
    kv.copy(2, 0, 20)
    assert [stored(kv, row, 20) for row in range(3)] == [{3.0}, {2.0}, {3.0}]


def test_a_cleared_row_has_no_nan() -> None:
    kv = cache(100_000)
    kv.reserve(2, 20, [20] * 2)
    fill(kv, 1, float("nan"), 20)
    kv.clear(1)
    assert stored(kv, 1, 20) == {0.0}


def test_no_memory_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = cache(100_000)
    kv.reserve(1, 20, [20])
    fill(kv, 0, 5.0, 20)
    zeros, calls = torch.zeros, []

    def scarce(*shape: int, **options: object) -> torch.Tensor:
        calls.append(shape)
        if len(calls) > 2:
            raise torch.OutOfMemoryError
        return zeros(*shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "zeros", scarce)
        with pytest.raises(torch.OutOfMemoryError):
            kv.reserve(2, 600, [600] * 2)
    assert stored(kv, 0, 20) == {5.0}
    kv.reserve(2, 600, [600] * 2)
    assert stored(kv, 0, 20) == {5.0}
    assert stored(kv, 1, 600) == {0.0}


def test_release_gives_everything_back() -> None:
    kv = cache(100_000)
    kv.reserve(2, 20, [20] * 2)
    kv.release()
    assert kv.bytes == 0
