"""For tests and benchmarks: a real server process, and models that follow a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

START_TIMEOUT_S = 60.0
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte of UTF-8 text: 256 tokens in all."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(
        BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def scripted_model(folder: Path, *, context_tokens: int = 4096, **script: Any) -> Path:  # noqa: ANN401
    """Write a source folder of a model of the scripted engine and return it.

    `script` is what `engine.scripted.Script` takes: step_ms, tokens, faults and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    config = {
        "model_type": "lowbit_scripted",
        "architectures": ["ScriptedModel"],
        "max_position_embeddings": context_tokens,
        "vocab_size": 256,
        "script": script,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class ServerProcess:
    """A `lowbit-server` on a free loopback port; the block's end kills it."""

    def __init__(
        self, home: Path, *flags: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Describe the server; `with` starts it.

        `environment` adds LOWBIT_… variables; scripted models are allowed.
        """
        self.home = home
        self._flags = flags
        self._environment = {"LOWBIT_SCRIPTED_MODELS": "true"} | dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it and wait until it serves; raise RuntimeError with its log when it does not."""
        self.home.mkdir(parents=True, exist_ok=True)
        self._address_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "lowbit_server", "--home", str(self.home)]
        command += ["--listen", "127.0.0.1:0", *self._flags]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                command, env=os.environ | self._environment, stderr=log
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._address_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                message = f"the server did not start:\n{self.log_file.read_text()[-4000:]}"
                raise RuntimeError(message)
            time.sleep(0.02)  # the file is the only sign there is
        return self

    @property
    def log_file(self) -> Path:
        """Where its JSON log goes."""
        return self.home / "server.log"

    @property
    def _address_file(self) -> Path:
        return self.home / "address"

    @property
    def address(self) -> str:
        """HOST:PORT of the API."""
        return self._address_file.read_text().strip()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None  # noqa: S101 - the caller started it
        return self._process.pid

    def log(self) -> list[dict[str, Any]]:
        """Return what it has logged."""
        lines = self.log_file.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for its end and return its exit code."""
        assert self._process is not None  # noqa: S101 - the caller started it
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once, as a crash would; does nothing when it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Kill it."""
        self.kill()
