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


def test_logprobs(service: Service) -> None:
    service.load_scripted("sure", step_ms=1.0)
    lines = run(service, "logprobs.py", "sure", "ab").splitlines()
    assert len(lines) == 2 + 16
    assert lines[0] == "'a'          first"
    assert lines[1] == "'b'          50.0% of {'b': '50.0%', 'c': '25.0%', 'd': '12.5%'}"
    assert lines[2] == "'a'          50.0% of {'a': '50.0%', 'b': '25.0%', 'c': '12.5%'}"


def test_score(service: Service) -> None:
    service.load_scripted("scored", step_ms=1.0)
    out = run(service, "score.py", "scored", "ab", "ab", "bb", "abab").splitlines()
    assert out == ["  -0.693  'ab'", "  -1.040  'bb'", "  -0.693  'abab'"]


def test_outputs(service: Service) -> None:
    service.load_scripted("thrice", step_ms=1.0)
    out = run(service, "outputs.py", "thrice", "abc").splitlines()
    assert out[:3] == [repr("abc" * 8), repr("bca" * 8), repr("cab" * 8)]
    assert "output_tokens: 72" in "\n".join(out)


def test_prefix(service: Service, tmp_path: Path) -> None:
    service.load_scripted("read", step_ms=1.0)
    document = tmp_path / "document.txt"
    document.write_text("All is said.")
    out = run(service, "prefix.py", "read", str(document), "What?", "Why?").splitlines()
    found = [line for line in out if line.startswith("0 of ")]  # the script has no KV cache
    assert len(found) == 2


def test_exact(service: Service) -> None:
    service.load_scripted("exact", step_ms=1.0)
    text, *chunks = run(service, "exact.py", "exact", "abc").splitlines()
    assert text == "abc" * 8
    assert sum(int(chunk.split(":")[0]) for chunk in chunks) == 24
