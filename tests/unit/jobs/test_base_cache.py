from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from lowbit_server.jobs.base_cache import BaseCache, Figures, key_of

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = Figures(live_bytes=7, prefill_tokens_per_second=1 / 3, decode_tokens_per_second=0.1)


def logits(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 300, generator=generator).to(dtype) for rows in (40, 40, 1)]


def put(cache: BaseCache, key: str) -> None:
    cache.add(key, iter(logits()), lambda: FIGURES)


def keys(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def used(folder: Path, key: str, at: int) -> None:
    os.utime(folder / key, (at, at))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "evaluations"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_is_found_is_what_was_added_bit_by_bit(folder: Path, dtype: torch.dtype) -> None:
    cache = BaseCache(folder, 1 << 20)
    assert cache.find("a") is None
    assert cache.takes(1 << 20)
    cache.add("a", iter(logits(dtype)), lambda: FIGURES)
    entry = BaseCache(folder, 1 << 20).find("a")
    assert entry is not None
    assert entry.figures() == FIGURES
    found = list(entry.logits())
    assert [one.dtype for one in found] == [dtype] * 3
    assert all(map(torch.equal, found, logits(dtype)))
    assert keys(folder) == {"a"}


@pytest.mark.parametrize("damage", ["flipped", "cut", "entry", "gone"])
def test_what_is_damaged_is_dropped(folder: Path, damage: str) -> None:
    cache = BaseCache(folder, 1 << 20)
    assert cache.takes(1)
    put(cache, "a")
    weights, entry = folder / "a" / "model.safetensors", folder / "a" / "entry.json"
    data = weights.read_bytes()
    match damage:
        case "flipped":
            weights.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        case "cut":
            weights.write_bytes(data[:-100])
        case "entry":
            entry.write_bytes(entry.read_bytes()[:-5])
        case "gone":
            weights.unlink()
    assert cache.find("a") is None
    assert keys(folder) == set()
    put(cache, "a")
    assert cache.find("a") is not None


def test_the_entries_used_last_stay_within_the_bound(folder: Path) -> None:
    cache = BaseCache(folder, 1 << 20)
    assert cache.takes(1)
    put(cache, "a")
    size = sum(path.stat().st_size for path in (folder / "a").iterdir())
    cache = BaseCache(folder, 3 * size)
    put(cache, "b")
    put(cache, "c")
    for at, key in enumerate(("a", "b", "c"), 1000):
        used(folder, key, at)
    kept = cache.find("a")  # now the one used last
    put(cache, "d")
    assert keys(folder) == {"a", "c", "d"}
    # Who has opened an entry keeps it, whatever becomes of its files.
    put(BaseCache(folder, size), "e")
    assert keys(folder) == {"e"}
    assert kept is not None
    assert all(map(torch.equal, kept.logits(), logits()))


def test_what_is_too_large_is_not_taken(folder: Path) -> None:
    assert not BaseCache(folder, 0).takes(1)
    assert not BaseCache(folder, 100).takes(101)
    assert not BaseCache(folder, 1 << 60).takes(1 << 59)  # more than the disk has
    assert not list(folder.iterdir())


def test_nothing_half_done_stays(folder: Path) -> None:
    cache = BaseCache(folder, 1 << 20)
    assert cache.takes(1)

    def broken() -> Figures:
        message = "the model broke"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="broke"):
        cache.add("a", iter(logits()), broken)
    assert keys(folder) == set()
    for name in ("part-old", "part-new"):  # as a killed job leaves them
        (folder / name).mkdir()
    used(folder, "part-old", 1000)
    put(cache, "a")
    assert keys(folder) == {"a", "part-new"}


def test_every_fact_changes_the_key() -> None:
    facts = [("r", "t", {"threads": 1}), ("s", "t", {"threads": 1}), ("r", "t", {"threads": 2})]
    assert len({key_of(*one) for one in facts}) == 3
    assert key_of("r", {"a": 1, "b": 2}) == key_of("r", {"b": 2, "a": 1})
