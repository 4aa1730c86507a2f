from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from lowbit_server.jobs.spec import JOB_REPORT, Failed
from lowbit_server.testing import byte_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pydantic import BaseModel

END_TIMEOUT_S = 60


@dataclass
class JobProcess:
    """A job process as the front sees it: three pipes."""

    process: subprocess.Popen[str]
    staging: Path

    def finish(self) -> tuple[int, list[BaseModel]]:
        """Wait for its end, with stdin open, and return its code and reports."""
        assert self.process.stdout is not None
        reports: list[BaseModel] = [JOB_REPORT.validate_json(line) for line in self.process.stdout]
        return self.process.wait(END_TIMEOUT_S), reports

    def failure(self) -> Failed:
        code, reports = self.finish()
        assert code == 1
        assert isinstance(reports[-1], Failed)
        return reports[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., JobProcess]]:
    """Start job processes: spec, staging folder, more flags."""
    started: list[JobProcess] = []

    def start(spec: object, *flags: str, staging: Path | None = None) -> JobProcess:
        file = tmp_path / "spec.json"
        file.write_text(spec if isinstance(spec, str) else json.dumps(spec))
        staging = staging or tmp_path / "staging"
        command = [sys.executable, "-m", "lowbit_server.jobs.process", "--spec", str(file)]
        command += ["--staging", str(staging), "--checkpoint", str(tmp_path / "checkpoint")]
        command += ["--models", str(tmp_path / "models")]
        command += ["--cache", str(tmp_path / "cache"), *flags]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        started.append(JobProcess(process, staging))
        return started[-1]

    yield start
    for job in started:
        with job.process:
            job.process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A source with 4 MB of weights, which no import has to understand."""
    folder = tmp_path / "source"
    folder.mkdir()
    config = {"architectures": ["X"], "max_position_embeddings": 8, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [3, 4]}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    tensors = {f"layers.{number}.weight": torch.full((2**18,), number) for number in range(4)}
    save_file({name: one.float() for name, one in tensors.items()}, folder / "model.safetensors")
    return folder
