"""The hub import against a server on the loopback that answers as the hub does."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from lowbit_server.errors import Reason
from lowbit_server.jobs.spec import Staged
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest
from tests.unit.hub import FakeHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.jobs.conftest import JobProcess

    Start = Callable[..., JobProcess]

SPEC = {"kind": "import", "model": "tiny", "hub_id": "org/name@v1"}


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Serve a folder as the model org/name, revision v1; yield the paths that are asked for."""
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"")
    with FakeHub({"models/org/name": {"v1": folder}}) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub.asked


def test_a_hub_model_is_fetched_and_imported(start: Start, hub: list[str]) -> None:
    job = start(SPEC)
    code, reports = job.finish()
    assert (code, reports[-1]) == (0, Staged())
    manifest = Manifest.model_validate_json((job.staging / MANIFEST_FILE).read_bytes())
    assert manifest.source == "org/name@v1"
    assert re.fullmatch("[0-9a-f]{40}", manifest.source_revision)
    assert {file.path for file in manifest.source_files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    fetched = [path for path in hub if "/resolve/" in path]
    assert all(f"/resolve/{manifest.source_revision}/" in path for path in fetched)
    assert not (job.staging / ".download").exists()
    assert {file.path for file in manifest.files} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert not any("pytorch_model" in path or "consolidated" in path for path in hub)


@pytest.mark.parametrize("hub_id", ["org/absent", "no such id", "org/name@absent"])
def test_what_the_hub_lacks_is_not_found(hub_id: str, start: Start, hub: list[str]) -> None:
    failure = start(SPEC | {"hub_id": hub_id}).failure()
    assert failure.reason is Reason.SOURCE_NOT_FOUND
    assert hub_id in failure.message


def test_without_a_network_nothing_is_found(start: Start, hub: list[str]) -> None:
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the fixture's patch puts it back
    failure = start(SPEC).failure()
    assert failure.reason is Reason.SOURCE_NOT_FOUND
    assert "cannot be fetched" in failure.message
