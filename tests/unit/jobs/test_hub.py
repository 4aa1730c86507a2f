"""The hub import against a server on the loopback that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING

import pytest

from lowbit_server.errors import Reason
from lowbit_server.jobs.spec import Staged
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.jobs.conftest import JobProcess

    Start = Callable[..., JobProcess]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPEC = {"kind": "import", "model": "tiny", "hub_id": "org/name@v1"}


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Serve a folder as the model org/name, revision v1; yield the paths that are asked for."""
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path.startswith("/api/models/org/name/revision/v1"):
                self._answer(200, json.dumps({"id": "org/name", "sha": COMMIT}).encode())
                return
            if self.path.startswith(f"/api/models/org/name/tree/{COMMIT}"):
                files = [one for one in folder.rglob("*") if one.is_file()]
                self._answer(200, json.dumps([self._entry(file) for file in files]).encode())
                return
            prefix = f"/org/name/resolve/{COMMIT}/"
            file = folder / self.path.removeprefix(prefix)
            found = self.path.startswith(prefix) and file.is_file()
            self._answer(200 if found else 404, file.read_bytes() if found else b"")

        def _entry(self, file: Path) -> dict[str, object]:
            return {
                "type": "file",
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                "size": file.stat().st_size,
                "path": str(file.relative_to(folder)),
            }

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')  # as the hub: git's
            self.send_header("X-Repo-Commit", COMMIT)
            if code == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_fetched_and_imported(start: Start, hub: list[str]) -> None:
    job = start(SPEC)
    code, reports = job.finish()
    assert (code, reports[-1]) == (0, Staged())
    manifest = Manifest.model_validate_json((job.staging / MANIFEST_FILE).read_bytes())
    assert manifest.source == "org/name@v1"
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
