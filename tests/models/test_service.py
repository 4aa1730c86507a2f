"""The main job through a real server: import, quantize, load, generate, compare."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit import Client, ContextLengthError, InvalidArgumentError, JobFailedError
from lowbit.v1 import errors_pb2
from lowbit.v1.quantization_pb2 import Calibration, Evaluation, QualityGate
from lowbit_server.testing import ServerProcess
from tests.models.quantkit import FAMILIES, random_source
from tests.models.ties import parts_at_a_tie

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMES = ("bf16", "fp32", "int8", "nf4", "rtn", "gptq", "awq")
MEASURED = ("nf4", "gptq")
CALIBRATION = Calibration(samples=16, sequence_tokens=128)
EVALUATION = Evaluation(max_tokens=512, window_tokens=256)
NEW_TOKENS = 16
COLD_MS, WARM_UP_S = 5000, 120.0
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three primary colours are",
    "To make bread, you need",
    "In 1969, humans",
    "The opposite of hot is",
    "A triangle has",
    "import numpy as",
    "Dear Sir or Madam,",
    "The quick brown fox",
    "Photosynthesis is the process by which",
    "1, 2, 3, 4,",
    "My favourite season is",
    "The largest planet in our solar system",
    "SELECT name FROM",
    "Roses are red,",
    "How do I tie a tie? First,",
    "Él vive en",
)


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with SmolLM2 in every scheme, all live; two are measured."""
    home = tmp_path_factory.mktemp("main-job") / "home"
    environment = {"LOWBIT_IMPORT_ROOTS": str(smollm2_gguf.parent)}
    with ServerProcess(home, environment=environment) as server:
        with Client(server.address) as client:
            client.wait_job(client.import_model("bf16", path=str(smollm2_gguf)).id)
            for scheme in SCHEMES[1:]:
                measured = scheme in MEASURED
                job = client.quantize(
                    "bf16",
                    scheme,
                    scheme,
                    calibration=CALIBRATION if scheme in {"gptq", "awq"} else None,
                    evaluation=EVALUATION if measured else None,
                    skip_evaluation=not measured,
                )
                client.wait_job(job.id)
            for name in SCHEMES:
                client.load(name).wait()
        yield server


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_greedy_output_equals_generate(name: str, server: ServerProcess) -> None:
    folder = server.home / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[name]
    parted = 0
    with Client(server.address) as client:
        for prompt in PROMPTS:
            inputs = tokenizer(prompt, return_tensors="pt")
            expected = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None
            )[0, inputs["input_ids"].shape[1] :].tolist()
            stream = client.generate(
                name, prompt, max_tokens=NEW_TOKENS, temperature=0, token_ids_output=True
            )
            found = [token for chunk in stream for token in chunk.token_ids]
            text = tokenizer.decode(found, skip_special_tokens=True)
            assert stream.partial_text == text
            ids = inputs["input_ids"][0].tolist()
            parted += parts_at_a_tie(model, ids, found, expected)
    assert not parted or name == "bf16"


@pytest.mark.parametrize("name", ["bf16", "int8", "nf4", "rtn", "gptq", "awq"])
def test_the_command_line_knows_paris(name: str, server: ServerProcess) -> None:
    command = [str(Path(sys.executable).parent / "lowbit"), "--address", server.address]
    command += ["generate", name, "The capital of France is"]
    command += ["--max-tokens", "8", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "Paris" in done.stdout


def run_example(server: ServerProcess, name: str, *arguments: str) -> str:
    """Return what an example prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "examples" / name), *arguments],
        env=os.environ | {"LOWBIT_ADDRESS": server.address},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_samples(server: ServerProcess) -> None:
    lines = run_example(server, "sampling.py", "fp32", "Water boils at").splitlines()
    texts = dict(line.split(": ", 1) for line in lines)
    assert len(texts) == 7
    assert " the " in texts["greedy"]
    assert texts["hot, none far from the best"] != texts["greedy"]
    assert texts["without repeating itself"] != texts["greedy"]
    assert " the " not in texts["never ' the'"]


def test_the_example_ends(server: ServerProcess) -> None:
    lines = run_example(server, "ends.py", "fp32", "Once upon a time, in").splitlines()
    counted, stopped, later, timed, echoed = lines
    assert counted.endswith("(MAX_TOKENS, 8 tokens)")
    assert "(STOP, " in stopped
    tokens = int(later.rpartition("(STOP, ")[2].split()[0])
    assert tokens >= 20
    assert "(TIME_LIMIT, " in timed
    assert "'Once upon a time, in" in echoed


def test_the_example_quantizes_and_loads(server: ServerProcess) -> None:
    out = run_example(server, "quantize_then_load.py", "bf16", "example", "nf4")
    assert "live on cpu/0: " in out
    with Client(server.address) as client:
        client.unload("example")
        client.delete_model("example")


def test_a_missed_gate_fails_the_job_with_what_was_measured(server: ServerProcess) -> None:
    evaluation = Evaluation(max_tokens=256, window_tokens=128)
    gate = QualityGate(max_mean_kl=0.001, max_bytes=200_000_000)
    with Client(server.address) as client:
        job = client.quantize("bf16", "gated", "fp4", evaluation=evaluation, gate=gate)
        with pytest.raises(JobFailedError) as caught:
            client.wait_job(job.id)
        assert caught.value.job.error.reason == errors_pb2.ERROR_REASON_QUALITY_GATE_FAILED
        assert "max_mean_kl 0.001: measured 0." in caught.value.job.error.message
        assert "max_bytes" not in caught.value.job.error.message
        assert "gated" not in {model.name for model in client.models()}
        with pytest.raises(InvalidArgumentError, match="skip_evaluation"):
            client.quantize("bf16", "gated", "fp4", gate=gate, skip_evaluation=True)
    assert not any((server.home / "staging").iterdir())


def test_a_prompt_beyond_the_kv_budget_is_refused_like_one_beyond_the_context(
    tmp_path: Path,
) -> None:
    source = random_source(tmp_path / "source", model_type="llama", max_position_embeddings=8192)
    # Keys and values of 3 layers, 2 heads of 32 in bf16: 768 bytes a token, in blocks of 32.
    environment = {"LOWBIT_IMPORT_ROOTS": str(tmp_path), "LOWBIT_KV_CACHE_BYTES": str(1 << 20)}
    with (
        ServerProcess(tmp_path / "home", environment=environment) as server,
        Client(server.address) as client,
    ):
        client.wait_job(client.import_model("m", path=str(source)).id)
        client.load("m").wait()
        with pytest.raises(ContextLengthError) as caught:
            client.generate("m", "x" * 2000, max_tokens=4).text()
        assert caught.value.metadata["context_tokens"] == str((1 << 20) // 768 // 32 * 32)
        stream = client.generate("m", "x" * 1000, max_tokens=4, ignore_eos=True)
        stream.text()
        assert stream.usage is not None
        assert stream.usage.output_tokens == 4


def test_estimates_are_within_5_percent(server: ServerProcess) -> None:
    with Client(server.address) as client:
        models = {model.name: model for model in client.models()}
        for name in SCHEMES:
            measured = models[name].replicas[0].live_bytes
            copy = client.estimate_quantization("bf16", name)
            assert copy.disk_bytes == pytest.approx(models[name].disk_bytes, rel=0.05)
            assert copy.devices[0].live_bytes == pytest.approx(measured, rel=0.05)
            assert copy.devices[0].duration.ToMilliseconds() > 1000
            (load,) = client.estimate_load(name).devices
            assert load.device == "cpu"
            assert load.live_bytes == copy.devices[0].live_bytes
            assert load.peak_memory_bytes >= load.live_bytes
            assert load.fits
            # 30 layers, 3 heads of 64, keys and values.
            assert load.kv_bytes_per_token == 30 * 3 * 64 * 2 * (4 if name == "fp32" else 2)
        with pytest.raises(InvalidArgumentError, match="quantized already"):
            client.estimate_quantization("nf4", "rtn")


def test_a_worker_warms_up_when_the_store_gets_weights(tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    environment = {"LOWBIT_IMPORT_ROOTS": str(source.parent)}
    with (
        ServerProcess(tmp_path / "home", environment=environment) as server,
        Client(server.address) as client,
    ):
        client.wait_job(client.import_model("tiny", path=str(source)).id)
        ends = time.monotonic() + WARM_UP_S
        # What is left without the imports; nothing is ever loaded here.
        while client.estimate_load("tiny").devices[0].duration.ToMilliseconds() >= COLD_MS:
            assert time.monotonic() < ends


@pytest.mark.parametrize("name", ["fp32", "int8", "rtn", "awq"])
def test_the_peak_of_a_job_is_as_estimated(name: str, server: ServerProcess) -> None:
    with Client(server.address) as client:
        (job,) = (job for job in client.jobs() if job.model == name)
        calibration = CALIBRATION if name == "awq" else None
        (expected,) = client.estimate_quantization("bf16", name, calibration=calibration).devices
        # What libraries take, the most of it, differs a little between machines.
        measured = job.progress.peak_memory_bytes
        assert expected.peak_memory_bytes == pytest.approx(measured, rel=0.1)


def test_smaller_is_smaller_and_measured(server: ServerProcess) -> None:
    with Client(server.address) as client:
        models = {model.name: model for model in client.models()}
        live = {name: model.replicas[0].live_bytes for name, model in models.items()}
        assert live["nf4"] < live["int8"] < live["bf16"] < live["fp32"]
        # All parameters once (the head is tied), and next to nothing beside them.
        assert live["bf16"] == pytest.approx(2 * models["bf16"].parameters, rel=0.01)
        assert live["fp32"] == pytest.approx(4 * models["fp32"].parameters, rel=0.01)
        for name in MEASURED:
            quality = models[name].quality
            assert models[name].parent == "bf16"
            assert quality.base_perplexity < quality.perplexity * 1.01
            assert 0.01 < quality.mean_kl < quality.p99_kl
        assert models["gptq"].quality.mean_kl < 0.8 * models["nf4"].quality.mean_kl
        listed = {one.model: one for device in client.devices() for one in device.models}
        assert {name: one.live_bytes for name, one in listed.items()} == live
