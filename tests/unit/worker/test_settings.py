from __future__ import annotations

import pytest

from lowbit_server.worker.settings import Settings, parse


def test_all_flags() -> None:
    flags = "--socket /s --device cuda:1 --threads 3 --max-running 9 --kv-cache-bytes 4096"
    assert parse(flags.split()) == Settings("/s", "cuda:1", 3, 9, 4096)


@pytest.mark.parametrize(
    "flags", ["", "--socket /s --threads 0", "--socket /s --max-running x", "--socket /s --speed 1"]
)
def test_bad_flags_end_the_process(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(flags.split())
    assert "lowbit-worker" in capsys.readouterr().err
