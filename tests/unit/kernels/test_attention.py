from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server import kernels
from lowbit_server.kernels.attention import BlockAttention
from lowbit_server.kernels.products import have_tiles
from lowbit_server.models.decoder import BLOCK_TOKENS, blocks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler built the kernels")
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}


class Case:
    """Random heads of some sequences, each with some tokens in the cache and some new ones."""

    def __init__(
        self,
        rows: Sequence[tuple[int, int]],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.shape = shape
        self.counts = [new for _, new in rows]
        heads, groups, size = shape
        generator = torch.Generator().manual_seed(seed)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(dtype)

        blocks = sum(blocks_of(start + new) for start, new in rows)
        order = torch.randperm(blocks, generator=generator).tolist()
        longest = max(blocks_of(start + new) for start, new in rows)
        tables = []
        for start, new in rows:
            count = blocks_of(start + new)
            tables.append([*order[:count], *(0,) * (longest - count)])
            del order[:count]
        self.tables = torch.tensor(tables)
        self.positions = torch.tensor([start + at for start, new in rows for at in range(new)])
        self.owners = torch.tensor([row for row, (_, new) in enumerate(rows) for _ in range(new)])
        tokens = len(self.positions)
        # As one product leaves them: queries, keys and values of a token side by side.
        self.projected = random(tokens, heads + 2 * groups, size)
        angles = self.positions[:, None] * torch.rand(size // 2, generator=generator)
        cosine, sine = angles.cos(), angles.sin()
        self.cosine = torch.cat([cosine, cosine], -1)[:, None].to(dtype)
        self.sine = torch.cat([-sine, sine], -1)[:, None].to(dtype)
        self.cache = tuple(random(blocks, groups, BLOCK_TOKENS, size) for _ in range(2))

    def only(self, own: Tensor) -> Case:
        """Return a case of some tokens of one sequence, by their numbers, with the same cache."""
        case = copy(self)
        for name in ("positions", "owners", "projected", "cosine", "sine"):
            setattr(case, name, getattr(self, name)[own])
        case.counts = [len(own)]
        return case

    def found(self, window: int | None, *, rotary: bool) -> Tensor:
        """Return what the kernel finds; it writes to the cache."""
        heads, groups, _ = self.shape
        attention = BlockAttention(
            self.counts,
            (self.positions, self.owners, self.tables),
            (self.cosine, self.sine),
            self.shape,
        )
        turned, values = self.projected[:, : heads + groups], self.projected[:, heads + groups :]
        return attention.attend(
            turned, values, (self.cache[0], self.cache[1]), window=window, rotary=rotary
        )

    def expected(self, window: int | None, *, rotary: bool) -> Tensor:
        """Compute in float64 what it must find, token by token."""
        heads, groups, size = self.shape
        exact = self.projected.double()
        if rotary:
            half = exact.roll(size // 2, -1) * self.sine.double()
            turned = exact * self.cosine.double() + half
            exact = torch.cat([turned[:, : heads + groups], exact[:, heads + groups :]], 1)
        keys, values = (pool.double() for pool in self.cache)
        for token, (row, place) in enumerate(zip(self.owners, self.positions, strict=True)):
            block = self.tables[row, place // BLOCK_TOKENS]
            keys[block, :, place % BLOCK_TOKENS] = exact[token, heads : heads + groups]
            values[block, :, place % BLOCK_TOKENS] = exact[token, heads + groups :]
        found = []
        for token, (row, place) in enumerate(zip(self.owners, self.positions, strict=True)):
            first = max(0, int(place) + 1 - window) if window else 0
            own = self.tables[row]
            seen = [
                pool[own].transpose(0, 1).flatten(1, 2)[:, first : int(place) + 1]
                for pool in (keys, values)
            ]
            for head in range(heads):
                group = head // (heads // groups)
                scores = seen[0][group] @ exact[token, head] / math.sqrt(size)
                found.append(scores.softmax(0) @ seen[1][group])
        return torch.stack(found).view(len(self.positions), heads * size)


@settings(deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 100), st.integers(1, 5) | st.integers(30, 60)),
        min_size=1,
        max_size=4,
    ),
    shape=st.sampled_from(
        [(4, 4, 64), (9, 3, 64), (4, 1, 96), (32, 2, 16), (2, 2, 256), (2, 1, 128), (3, 1, 6)]
    ),
    window=st.sampled_from([None, 1, 7, 40, 90]),
    rotary=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_it_finds_what_float64_finds(
    *,
    rows: list[tuple[int, int]],
    shape: tuple[int, int, int],
    window: int | None,
    rotary: bool,
    dtype: torch.dtype,
) -> None:
    case = Case(rows, shape, dtype)
    expected = case.expected(window, rotary=rotary)
    found = case.found(window, rotary=rotary)
    assert found.dtype is dtype
    assert (found.double() - expected).norm() <= BOUND[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_else_is_there_and_threads_change_no_bit(dtype: torch.dtype) -> None:
    shape, rows = (9, 3, 64), [(300, 1), (7, 3), (80, 1)]
    together = Case(rows, shape, dtype)
    # Alone: the same tokens, cache and table, and nothing of the others.
    own = (together.owners == 1).nonzero()[:, 0]
    alone = Case(rows, shape, dtype).only(own)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = together.found(None, rotary=True)
        torch.set_num_threads(1)
        assert torch.equal(alone.found(None, rotary=True), found[own])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not have_tiles(), reason="this CPU computes each token by itself")
@pytest.mark.parametrize("window", [None, 50])
def test_a_prompt_is_the_same_in_parts_and_beside_others(window: int | None) -> None:
    shape, rows = (9, 3, 64), [(90, 40), (0, 300), (3, 1)]
    together = Case(rows, shape, torch.bfloat16)
    own = (together.owners == 1).nonzero()[:, 0]
    expected = together.found(window, rotary=True)[own]
    alone = Case(rows, shape, torch.bfloat16)
    parts = [alone.only(part).found(window, rotary=True) for part in (own[:70], own[70:])]
    assert torch.equal(torch.cat(parts), expected)


def test_what_the_cache_held_before_is_not_seen() -> None:
    rows = [(40, 5), (0, 50), (0, 1)]
    case = Case(rows, (4, 2, 64), torch.bfloat16)
    expected = case.expected(None, rotary=True)
    for number, (start, new) in enumerate(rows):
        for place in range(start, BLOCK_TOKENS * blocks_of(start + new)):
            block = case.tables[number, place // BLOCK_TOKENS]
            for pool in case.cache:
                pool[block, :, place % BLOCK_TOKENS] = torch.nan
    found = case.found(None, rotary=True)
    assert (found.double() - expected).norm() <= BOUND[torch.bfloat16] * expected.norm()


def test_a_row_that_is_not_a_number_stays_alone() -> None:
    case = Case([(40, 1), (40, 1)], (4, 2, 64), torch.bfloat16)
    case.projected[0] = torch.nan
    found = case.found(None, rotary=True)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    case = Case([(70, 1)], (2, 1, 64), torch.float32)
    case.projected *= 1e4
    case.cache[0].mul_(1e4)
    expected = case.expected(None, rotary=False)
    torch.testing.assert_close(case.found(None, rotary=False).double(), expected, rtol=1e-4, atol=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    case = Case([(4, 1)], (2, 1, 16), dtype)
    with pytest.raises(NotImplementedError):
        case.found(None, rotary=True)


@pytest.mark.parametrize("shape", [(2, 2, 258), (17, 1, 16)])
def test_shapes_without_room_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(NotImplementedError):
        Case([(4, 1)], shape, torch.float32).found(None, rotary=True)
