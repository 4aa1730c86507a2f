from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import pytest

from lowbit_server.hardware import advise

PAGES = 64


def resident(address: int, size: int) -> int:
    """Return how many pages of a mapping are this process's."""
    for mapping in Path("/proc/self/smaps").read_text().split("VmFlags"):
        lines = mapping.strip().splitlines()
        head = next((line for line in lines if line.split()[0].count("-") == 1), "")
        if head and int(head.split("-")[0], 16) <= address < int(head.split("-")[1].split()[0], 16):
            rss = next(line for line in lines if line.startswith("Rss:"))
            return min(int(rss.split()[1]) * 1024, size) // mmap.PAGESIZE
    raise AssertionError


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes such advice")
def test_pages_of_a_file_are_dropped_and_come_again(tmp_path: Path) -> None:
    size = PAGES * mmap.PAGESIZE
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * (size // 256))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        before = mapped[:]
        assert resident(address, size) == PAGES
        # Neither the first page nor the last is whole.
        advise(address + 1, size - 2, "MADV_DONTNEED")
        assert resident(address, size) == 2
        assert mapped[:] == before


def test_advice_that_nobody_knows_changes_nothing() -> None:
    advise(0, 1 << 20, "MADV_UNHEARD_OF")
    advise(1, mmap.PAGESIZE, "MADV_DONTNEED")
