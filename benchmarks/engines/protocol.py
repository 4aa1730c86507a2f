"""What every system's program does: run cells, say when each token came.

Standard library only, since each system has an environment of its own. A program gets one
JSON argument, {"model": path, "cells": [{"name", "prompts", "tokens"}]}, and prints a JSON
line for each cell, {"name", "began", "arrivals"}, with the time at which each token of each
stream came, in seconds; at last {"peak_bytes"} of its own process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Run = Callable[[Prompts, int], list[list[float]]]
"""Takes prompts and how many tokens to make of each, greedily; returns arrivals."""

_WARM_UP_TOKENS = 4


def main(make: Callable[[str], Run], end: Callable[[], None] = lambda: None) -> None:
    """Run the plan on what `make` returns for a model's path, and then `end`."""
    plan: dict[str, Any] = json.loads(sys.argv[1])
    # What libraries print goes to stderr.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = make(plan["model"])
    for cell in plan["cells"]:
        run(cell["prompts"], _WARM_UP_TOKENS)
        began = time.perf_counter()
        arrivals = run(cell["prompts"], cell["tokens"])
        made = {len(stream) for stream in arrivals}
        if made != {cell["tokens"]}:
            raise SystemExit(f"{cell['name']}: streams of {made} tokens")
        reports.write(
            json.dumps({"name": cell["name"], "began": began, "arrivals": arrivals}) + "\n"
        )
        reports.flush()
    end()
    # Not ru_maxrss, which a process has from the one that started it.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    reports.write(json.dumps({"peak_bytes": peak}) + "\n")
    reports.flush()
    os._exit(0)  # some libraries hang when they are taken down
