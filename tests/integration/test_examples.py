"""Each example runs as it is printed, against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.conftest import Service

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(service: Service, name: str, *arguments: str) -> str:
    """Run an example and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=os.environ | {"LOWBIT_ADDRESS": service.server.address},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat(service: Service) -> None:
    service.load_scripted("chat", step_ms=1.0)
    out = run(service, "chat.py", "chat", "hello")
    assert out.startswith("<user>hello")
    assert "output_tokens: 200" in out


def test_cancel(service: Service) -> None:
    service.load_scripted("cancel", step_ms=5.0)
    assert run(service, "cancel.py", "cancel") == "Once \nleft early\n"


def test_errors(service: Service) -> None:
    out = run(service, "errors.py")
    assert out.count("MODEL_NOT_FOUND") == 2
    assert "sampling.temperature: " in out
    assert "sampling.top_p: " in out
