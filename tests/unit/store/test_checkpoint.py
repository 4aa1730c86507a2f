"""Checkpoints that are interrupted at every step and damaged in every file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.checkpoint import CHECKPOINT_FILE, Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCKS = 4
FINGERPRINT = {"source": "abc", "scheme.bits": "4", "torch": "2.15.0"}


class Crash(BaseException):
    """The process is gone; nothing may catch it."""


class Work:
    """A method whose every block depends on all before it."""

    def __init__(self, folder: Path, fingerprint: dict[str, str] = FINGERPRINT) -> None:
        self.checkpoint = Checkpoint(folder, fingerprint, threads=3)
        self.carried = torch.ones(100)
        if len(self.checkpoint):
            self.carried = self.checkpoint.state()["carried"]
        self.converted: list[int] = []

    def run(self, blocks: int = BLOCKS) -> list[dict[str, torch.Tensor]]:
        for number in range(len(self.checkpoint), blocks):
            self.converted.append(number)
            self.checkpoint.commit(
                self._convert(number), lambda: {"carried": self.carried}, expected_tensors=3
            )
        return [dict(self.checkpoint.block(number)) for number in range(len(self.checkpoint))]

    def _convert(self, number: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{number}.odd", torch.full((3,), number, dtype=torch.uint8)
        for name in ("a", "b"):
            self.carried = self.carried * 1.25 + number
            yield f"{number}.{name}", self.carried.clone()


def same(one: list[dict[str, torch.Tensor]], two: list[dict[str, torch.Tensor]]) -> bool:
    """Return whether blocks agree in every name, its place and every bit."""
    return len(one) == len(two) and all(
        list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What an uninterrupted run makes."""
    return Work(tmp_path_factory.mktemp("whole") / "checkpoints" / "job").run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a job's checkpoint goes."""
    return tmp_path / "checkpoints" / "job"


OPERATIONS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (shutil, "rmtree"),
    *((Path, name) for name in ("mkdir", "open", "rename", "replace", "write_text", "unlink")),
)


def crash_at(number: int, *, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process die before or after the file operation of a number, from 0."""
    left = number

    def dying(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            here = left == -1  # an operation may call others
            if here and not after:
                raise Crash
            result = operation(*arguments, **options)
            if here:
                if hasattr(result, "close"):
                    result.close()  # as the end of a process does
                raise Crash
            return result

        return call

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_file_operation_costs_one_block_at_most(
    tmp_path: Path,
    after: bool,  # noqa: FBT001 - a parameter of the test
    expected: Any,
) -> None:
    crashes = 0
    while True:
        folder = tmp_path / str(crashes) / "job"
        work = Work(folder)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(crashes, after=after, monkeypatch=patch)
            try:
                work.run(2)
            except Crash:
                pass
            else:
                break
        again = Work(folder)
        # The block whose commit died may be there or not; all before it are.
        assert len(again.checkpoint) in {len(work.converted) - 1, len(work.converted)}
        assert same(again.run(3), expected[:3])
        crashes += 1
    assert crashes > 20


def test_a_crash_while_leftovers_are_cleared(tmp_path: Path, expected: Any) -> None:
    crashes = 0
    while True:
        folder = tmp_path / str(crashes) / "job"
        Work(folder).run(2)
        (folder / "block-00002").mkdir()
        (folder / "block-00002" / "shard-00000.part").write_bytes(b"half")
        (folder / "state-00000").mkdir()
        with pytest.MonkeyPatch.context() as patch:
            crash_at(crashes, after=False, monkeypatch=patch)
            try:
                Work(folder)
            except Crash:
                pass
            else:
                break
        again = Work(folder)
        assert len(again.checkpoint) == 2
        assert same(again.run(), expected)
        crashes += 1
    assert crashes > 3


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1
    path.write_bytes(data)


def extend(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, flip, extend, replace_by_folder])
def test_a_damaged_file_is_never_used(
    tmp_path: Path, three: Path, damage: Callable[[Path], None], expected: Any
) -> None:
    names = [path.relative_to(three) for path in files(three)]
    assert len(names) == 3 + 1 + 1  # blocks, state, record
    for number, name in enumerate(names):
        folder = tmp_path / str(number) / "job"
        shutil.copytree(three, folder)
        damage(folder / name)
        work = Work(folder)
        assert work.checkpoint.threads == 3
        assert same(work.run(), expected)
        assert work.converted == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three blocks, to copy."""
    folder = tmp_path_factory.mktemp("three") / "job"
    Work(folder).run(3)
    return folder


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(file=st.integers(0, 4), at=st.integers(0, 1 << 14))
def test_a_flipped_byte_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, three: Path, file: int, at: int
) -> None:
    folder = tmp_path_factory.mktemp("flipped") / "job"
    shutil.copytree(three, folder)
    flip(files(folder)[file], at)
    assert len(Checkpoint(folder, FINGERPRINT, threads=1)) == 0
    assert list(folder.iterdir()) == []


def test_a_whole_checkpoint_is_used(folder: Path, expected: Any) -> None:
    Work(folder).run(3)
    work = Work(folder)
    assert same(work.run(), expected)
    assert work.converted == [3]
    done = Work(folder)
    assert same(done.run(), expected)
    assert done.converted == []
    assert done.checkpoint.bytes == sum(
        path.stat().st_size for path in files(folder) if path.parent.name.startswith("block")
    )


def test_only_the_newest_state_is_kept(folder: Path) -> None:
    Work(folder).run(3)
    assert {path.name for path in folder.iterdir()} == {
        *("block-00000", "block-00001", "block-00002", "state-00002"),
        CHECKPOINT_FILE,
    }


def test_the_first_process_decides_the_number_of_threads(folder: Path) -> None:
    Work(folder).run(1)
    assert Checkpoint(folder, FINGERPRINT, threads=8).threads == 3
    shutil.rmtree(folder)
    assert Checkpoint(folder, FINGERPRINT, threads=8).threads == 8


def test_a_checkpoint_of_other_inputs_is_refused_and_kept(folder: Path, expected: Any) -> None:
    Work(folder).run(3)
    other = {"source": "def", "scheme.bits": "4", "calibration": "123"}
    with pytest.raises(LowbitError) as caught:
        Work(folder, other)
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert caught.value.metadata["fields"] == "calibration, source, torch"
    for part in (
        "calibration was not set, is 123",
        "source was abc, is def",
        "torch was 2.15.0, is not set",
    ):
        assert part in caught.value.message
    assert "scheme.bits" not in caught.value.message
    work = Work(folder)  # what differed was put back
    assert same(work.run(), expected)
    assert work.converted == [3]


def test_blocks_without_state_or_tensors(folder: Path) -> None:
    first = Checkpoint(folder, FINGERPRINT, threads=1)
    first.commit([], dict, expected_tensors=0)
    first.commit([("x", torch.arange(5))], dict, expected_tensors=1)
    again = Checkpoint(folder, FINGERPRINT, threads=1)
    assert len(again) == 2
    assert again.state() == {}
    assert list(again.block(0)) == []
    ((name, tensor),) = again.block(1)
    assert name == "x"
    assert torch.equal(tensor, torch.arange(5))
