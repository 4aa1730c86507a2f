"""The command line of the server; what it refuses, it refuses before anything starts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from lowbit_server.cli import app

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LOWBIT_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers-per-device", "0"], "workers_per_device"),
        (["--listen", ""], "listen"),
        (["--listen", "nowhere"], "'nowhere'"),
        (["--device", "cpu", "--device", "tpu"], "'tpu'"),
        (["--import-root", "/no/such/folder"], "/no/such/folder"),
        (["--log-level", "loud"], "log_level"),
        (["--config", "/no/such/file.toml"], "/no/such/file.toml"),
    ],
)
def test_a_bad_flag_is_fatal_and_named(tmp_path: Path, arguments: list[str], named: str) -> None:
    home = tmp_path / "home"
    result = CliRunner().invoke(app, ["--home", str(home), *arguments])
    assert result.exit_code == 2
    assert result.output.startswith("lowbit-server: ")
    assert named in result.output
    assert len(result.output.splitlines()) == 1
    assert not home.exists()


def test_a_bad_variable_is_fatal_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_HOMES", "x")
    result = CliRunner().invoke(app, ["--home", str(tmp_path / "home")])
    assert result.exit_code == 2
    assert "LOWBIT_HOMES" in result.output
