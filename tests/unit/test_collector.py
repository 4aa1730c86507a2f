"""In a process of its own: freezing cannot be taken back."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
import lowbit_server.server
from lowbit_server import collector

before = len(gc.get_objects())
collector.freeze()
print(before, len(gc.get_objects()))
"""


def test_what_was_imported_is_not_looked_at_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    before, after = map(int, done.stdout.split())
    assert before > 50_000
    assert after < 100
