"""A worker process with real weights: load, generate, unload."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from tokenizers import Tokenizer

from tests.unit.worker.harness import Front

if TYPE_CHECKING:
    from collections.abc import Iterator

# Importing torch and transformers cold takes most of it.
DEADLINE_S = 180.0


@contextmanager
def attached(tmp_path: Path, kv_cache_bytes: int) -> Iterator[Front]:
    socket = tmp_path / "worker.sock"
    command = [sys.executable, "-m", "lowbit_server.worker", "--socket", str(socket)]
    with Popen([*command, "--kv-cache-bytes", str(kv_cache_bytes)], stdin=PIPE) as process:
        with Front(socket, DEADLINE_S) as front:
            front.wait_for("ready")
            yield front
        process.kill()


def test_weights_are_measured_used_and_given_back(smollm2_bf16: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2_bf16 / "tokenizer.json"))
    prompt = tokenizer.encode("The capital of France is").ids
    with attached(tmp_path, 1 << 28) as front:
        front.load("smollm2", smollm2_bf16)
        loaded = front.wait_for("loaded")
        weights = (smollm2_bf16 / "model.safetensors").stat().st_size
        assert loaded.live_bytes == pytest.approx(weights, rel=0.001)

        requests = [front.submit("smollm2", prompt, max_tokens=8) for _ in range(4)]
        front.produced(requests[-1], 1)
        assert pong(front).kv[0].kv_bytes > 0
        for request in requests:
            assert " Paris" in tokenizer.decode(front.finished(request).tokens)

        live = pong(front)
        assert live.kv[0].kv_bytes == 0
        front.unload("smollm2")
        front.wait_for("unloaded")
        freed_bytes = live.resident_bytes - pong(front).resident_bytes
        assert freed_bytes > 0.8 * loaded.live_bytes


def test_a_warm_worker_has_all_modules_that_a_load_needs(
    smollm2_bf16: Path, tmp_path: Path
) -> None:
    with attached(tmp_path, 1 << 28) as front:
        assert not pong(front).warm
        front.warm_up()
        while not pong(front).warm:
            pass
        libraries = mapped_libraries(tmp_path)
        assert any("libtorch" in library for library in libraries)
        front.load("smollm2", smollm2_bf16)
        front.wait_for("loaded")
        # Modules in C show what came late: the kernels, and what configurations need of
        # transformers. Neither takes long.
        late = mapped_libraries(tmp_path) - libraries
        assert {Path(library).name for library in late} <= {"kernels.so", "tokenizers.abi3.so"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked to page out")
def test_a_worker_without_a_gpu_keeps_no_pages_of_cuda(smollm2_bf16: Path, tmp_path: Path) -> None:
    with attached(tmp_path, 1 << 28) as front:
        front.load("smollm2", smollm2_bf16)
        front.wait_for("loaded")
        maps = worker_of(tmp_path).memory_maps(grouped=False)
        resident = [one.rss - one.anonymous for one in maps if "/nvidia/" in one.path]
        if not resident:
            pytest.skip("this build of torch has no CUDA")
        assert sum(resident) < 20 << 20


def test_a_kv_cache_without_room_fails_the_load(smollm2_bf16: Path, tmp_path: Path) -> None:
    with attached(tmp_path, 1000) as front:
        front.load("smollm2", smollm2_bf16)
        failed = front.wait_for("load_failed")
        assert failed.out_of_memory
        assert "KV cache" in failed.message


def worker_of(tmp_path: Path) -> psutil.Process:
    [worker] = [
        one for one in psutil.Process().children() if str(tmp_path) in " ".join(one.cmdline())
    ]
    return worker


def mapped_libraries(tmp_path: Path) -> set[str]:
    maps = worker_of(tmp_path).memory_maps()
    return {one.path for one in maps if ".so" in one.path}


def pong(front: Front) -> Any:
    front.ping()
    return front.wait_for("pong")
