from __future__ import annotations

import json
import os
import resource
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.errors import Reason
from lowbit_server.jobs.process import _ORPHANED
from lowbit_server.jobs.spec import Progress, Staged
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest
from lowbit_server.store.sealing import check_files
from lowbit_server.testing import scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.jobs.conftest import JobProcess

    Start = Callable[..., JobProcess]


def importing(path: Path, **more: str) -> dict[str, Any]:
    return {"kind": "import", "model": "tiny", "path": str(path)} | more


def test_a_job_reports_its_way_and_stages_a_sealed_artefact(start: Start, folder: Path) -> None:
    job = start(importing(folder), "--root", str(folder.parent))
    code, reports = job.finish()
    assert code == 0
    assert reports[-1] == Staged()
    progress = [report for report in reports if isinstance(report, Progress)]
    assert [report.phase for report in progress if report.done == 0][-1] == "save"
    assert (4, 4) in {(report.done, report.total) for report in progress}
    manifest = Manifest.model_validate_json((job.staging / MANIFEST_FILE).read_bytes())
    check_files(job.staging, manifest, digests=True)
    assert (manifest.name, manifest.parameters) == ("tiny", 2**20)
    assert (manifest.context_tokens, manifest.vocab_size) == (8, 256)
    assert manifest.eos_token_ids == (3, 4)
    assert manifest.scheme.name == "fp32"
    assert {file.name for file in job.staging.iterdir()} == {
        "config.json",
        "lowbit.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_scripted_models_are_imported_where_allowed(start: Start, tmp_path: Path) -> None:
    source = scripted_model(tmp_path / "scripted", step_ms=5)
    job = start(importing(source), "--root", str(tmp_path), "--scripted")
    code, reports = job.finish()
    assert (code, reports[-1]) == (0, Staged())
    manifest = Manifest.model_validate_json((job.staging / MANIFEST_FILE).read_bytes())
    assert (manifest.scheme.name, manifest.architecture) == ("scripted", "ScriptedModel")
    refused = start(importing(source), "--root", str(tmp_path), staging=tmp_path / "second")
    assert refused.failure().reason is Reason.SOURCE_UNSUPPORTED


def test_sources_are_checked_again(start: Start, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    job = start(importing(folder), "--root", str(tmp_path / "other"))
    assert job.failure().reason is Reason.SOURCE_NOT_ALLOWED


def test_a_missing_source_model_is_named(start: Start) -> None:
    spec = {
        "kind": "quantize",
        "model": "tiny",
        "source": "absent",
        "scheme": {"kind": "float", "type": "bf16"},
        "device": "cpu",
    }
    failure = start(spec).failure()
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert "absent" in failure.message


def test_an_unexpected_error_is_internal_and_logged(start: Start) -> None:
    job = start('{"kind": "import"')
    failure = job.failure()
    assert failure.reason is Reason.INTERNAL
    assert job.process.stderr is not None
    assert "Traceback" in json.loads(job.process.stderr.read().splitlines()[-1])["exception"]


def test_a_job_ends_when_its_front_is_gone(start: Start, tmp_path: Path) -> None:
    spec = tmp_path / "fifo"
    os.mkfifo(spec)  # nobody writes to it, so the job hangs
    job = start({}, "--spec", str(spec))
    assert job.process.stdin is not None
    job.process.stdin.close()
    assert job.process.wait(30) == _ORPHANED


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mounted)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def test_a_full_disk_fails_the_job(start: Start, folder: Path, small_disk: Path) -> None:
    job = start(importing(folder), "--root", str(folder.parent), staging=small_disk / "job")
    failure = job.failure()
    assert failure.reason is Reason.DISK_FULL
    assert "1048576 bytes were to be written" in failure.message
    assert not (job.staging / MANIFEST_FILE).exists()


def test_a_file_size_limit_fails_the_job(start: Start, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, hard))
    try:
        job = start(importing(folder), "--root", str(folder.parent))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert job.failure().reason is Reason.DISK_FULL
    assert not (job.staging / MANIFEST_FILE).exists()
