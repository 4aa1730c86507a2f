"""A server on the loopback that answers as the Hugging Face hub does."""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pytest


class FakeHub:
    """Serves folders as revisions of repositories, such as "models/org/name" or "datasets/…"."""

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]) -> None:
        self.asked: list[str] = []
        asked, answers = (
            self.asked,
            [
                _Revision(repository, revision, folder)
                for repository, revisions in repositories.items()
                for revision, folder in revisions.items()
            ],
        )

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                asked.append(self.path)
                for one in answers:
                    if (body := one.answer(self.path)) is not None:
                        self._answer(200, body, one.commit)
                        return
                self._answer(404, b"", "")

            def _answer(self, code: int, body: bytes, commit: str) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')  # as git does
                self.send_header("X-Repo-Commit", commit)
                if code == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def use(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Let processes that are started from here on take this for the hub."""
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{self._server.server_port}")
        monkeypatch.setenv("HF_HOME", str(cache))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


class _Revision:
    """A folder under the commit that the hub gives it."""

    def __init__(self, repository: str, revision: str, folder: Path) -> None:
        self._folder = folder
        self.commit = hashlib.sha1(f"{repository}{revision}".encode()).hexdigest()
        self._name = f"/api/{repository}/revision/{quote(revision, safe='')}"
        self._tree = f"/api/{repository}/tree/{self.commit}"
        self._files = f"/{repository.removeprefix('models/')}/resolve/{self.commit}/"

    def answer(self, path: str) -> bytes | None:
        if path.startswith(self._name):
            return json.dumps({"id": self._name, "sha": self.commit}).encode()
        if path.startswith(self._tree):
            files = [one for one in self._folder.rglob("*") if one.is_file()]
            return json.dumps([self._entry(file) for file in files]).encode()
        file = self._folder / path.removeprefix(self._files)
        return file.read_bytes() if path.startswith(self._files) and file.is_file() else None

    def _entry(self, file: Path) -> dict[str, object]:
        return {
            "type": "file",
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            "size": file.stat().st_size,
            "path": str(file.relative_to(self._folder)),
        }
