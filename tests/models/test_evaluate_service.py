"""Evaluation through a real server, on tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lowbit import Client, InvalidArgumentError, JobFailedError, scheme
from lowbit.v1 import errors_pb2, job_pb2
from lowbit.v1.quantization_pb2 import Evaluation, InlineText, QualityGate, TextSource
from lowbit_server.store.manifest import MANIFEST_FILE
from lowbit_server.testing import ServerProcess, scripted_model
from tests.models.quantkit import random_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CONTEXT = 640
RTN = scheme("rtn", group_size=32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two Llamas in fp32, and one of another vocabulary."""
    folder = tmp_path_factory.mktemp("evaluate")
    llama = {"model_type": "llama", "max_position_embeddings": CONTEXT, "initializer_range": 0.1}
    fp32 = torch.float32
    random_source(folder / "base", fp32, **llama)
    random_source(folder / "other", fp32, **llama, attention_bias=True)
    random_source(folder / "wider", fp32, **llama | {"vocab_size": 288})
    scripted_model(folder / "scripted")
    with ServerProcess(folder / "home", environment={"LOWBIT_IMPORT_ROOTS": str(folder)}) as server:
        with Client(server.address) as client:
            for name in ("base", "other", "wider", "scripted"):
                client.wait_job(client.import_model(name, path=str(folder / name)).id)
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture(scope="module")
def small(client: Client) -> str:
    """A quantized copy of the base, evaluated by default."""
    client.wait_job(client.quantize("base", "small", RTN).id)
    return "small"


def inline(*samples: str, window: int | None = None) -> Evaluation:
    return Evaluation(
        source=TextSource(inline=InlineText(samples=samples)), window_tokens=window, max_tokens=900
    )


def log_probabilities(folder: Path, windows: list[list[int]]) -> NDArray[np.float64]:
    """Return those of every predicted token, (tokens, vocabulary), in float64 throughout."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = []
    for window in windows:
        with torch.inference_mode():
            rows.append(model(torch.tensor([window])).logits[0, :-1].numpy())
    logits = np.concatenate(rows)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_figures_are_those_of_an_independent_float64_computation(
    client: Client, server: ServerProcess
) -> None:
    text = "Held-out words, to be cut into windows of more than one chunk each. " * 14
    job = client.evaluate("other", against="base", evaluation=inline(text, window=600))
    found = client.wait_job(job.id).quality
    models = server.home / "models"
    ids = Tokenizer.from_file(str(models / "base" / "tokenizer.json")).encode(text).ids[:900]
    windows = [ids[:600], ids[600:]]
    targets = np.array([*windows[0][1:], *windows[1][1:]])
    p, q = (log_probabilities(models / name, windows) for name in ("base", "other"))
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    at = np.arange(len(targets))
    assert len(ids) == 900
    assert found.tokens == len(targets) == 898
    assert found.perplexity == pytest.approx(np.exp(-q[at, targets].mean()), rel=1e-5)
    assert found.base_perplexity == pytest.approx(np.exp(-p[at, targets].mean()), rel=1e-5)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-4)
    assert found.median_kl == pytest.approx(np.median(kl), rel=1e-4)
    assert found.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-4)
    assert found.max_kl == pytest.approx(kl.max(), rel=1e-4)
    assert found.top1_agreement == (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert 0 < found.top1_agreement < 1


def test_quantizing_measures_by_default(client: Client, small: str) -> None:
    base, model = client.get_model("base"), client.get_model(small)
    found = model.quality
    (job,) = (one for one in client.jobs() if one.model == small)
    assert job.quality == found
    assert job.device == found.device == "cpu"
    # Eight windows of 512 tokens; the first of each is not predicted.
    assert found.tokens == 4096 - 8
    assert (found.base, found.base_revision) == ("base", base.revision)
    assert (found.disk_bytes, found.base_disk_bytes) == (model.disk_bytes, base.disk_bytes)
    assert found.base_live_bytes == pytest.approx(4 * base.parameters, rel=0.01)
    assert 0 < found.live_bytes < found.base_live_bytes
    assert 0 < found.median_kl < found.mean_kl < found.p99_kl < found.max_kl
    assert found.peak_memory_bytes > found.base_live_bytes
    for speed in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert getattr(found, speed) > 0
        assert getattr(found, f"base_{speed}") > 0


def test_a_report_against_the_parent_becomes_the_models(
    client: Client, server: ServerProcess, small: str
) -> None:
    before = client.get_model(small)
    job = client.evaluate(small, evaluation=inline("some other words " * 20))
    assert (job.kind, job.model, job.source) == (job_pb2.JOB_KIND_EVALUATE, small, "base")
    assert job.device == "cpu"
    assert not job.HasField("quality")
    report = client.wait_job(job.id).quality
    after = client.get_model(small)
    assert after.quality == report != before.quality
    assert report.text_digest != before.quality.text_digest
    assert (after.revision, after.files) == (before.revision, before.files)
    client.verify_model(small)
    stored = json.loads((server.home / "models" / small / MANIFEST_FILE).read_bytes())
    assert stored["quality"]["mean_kl"] == report.mean_kl
    assert not any((server.home / "staging").iterdir())


def test_a_report_against_another_model_is_its_jobs_alone(client: Client, small: str) -> None:
    before = client.get_model(small)
    report = client.wait_job(client.evaluate(small, against="other").id).quality
    assert report.base == "other"
    assert client.get_model(small) == before
    # Without a parent there is nothing to be the model's own.
    report = client.wait_job(client.evaluate("base", against="base").id).quality
    assert report.perplexity == report.base_perplexity
    assert (report.mean_kl, report.max_kl, report.top1_agreement) == (0, 0, 1)
    assert not client.get_model("base").HasField("quality")


def test_what_is_measured_is_in_use(client: Client, small: str) -> None:
    job = client.evaluate(small, evaluation=Evaluation(max_tokens=400_000))
    for name in (small, "base"):
        with pytest.raises(Exception, match=job.id) as caught:
            client.delete_model(name)
        assert getattr(caught.value, "reason", "") == "MODEL_IN_USE"
    client.cancel_job(job.id)
    with pytest.raises(JobFailedError, match="CANCELLED"):
        client.wait_job(job.id)


def test_a_gate_that_is_missed_keeps_the_artifact_only_when_asked(client: Client) -> None:
    limits = {"max_mean_kl": 1e-9, "max_bytes": 1 << 30}
    for keep in (False, True):
        gate = QualityGate(**limits, keep_artifact=keep)
        job = client.quantize("base", "gated", RTN, gate=gate, evaluation=inline("words " * 30))
        with pytest.raises(JobFailedError) as caught:
            client.wait_job(job.id)
        job = caught.value.job
        assert job.state == job_pb2.JOB_STATE_FAILED
        assert job.error.reason == errors_pb2.ERROR_REASON_QUALITY_GATE_FAILED
        assert "max_mean_kl 1e-09: measured 0.0" in job.error.message
        assert ("gated" in {model.name for model in client.models()}) is keep
    assert client.get_model("gated").quality == job.quality
    assert job.quality.mean_kl > 0
    client.verify_model("gated")
    client.delete_model("gated")


def test_switched_off_nothing_is_measured(client: Client) -> None:
    job = client.wait_job(client.quantize("base", "blind", "bf16", skip_evaluation=True).id)
    assert not job.HasField("quality")
    assert not client.get_model("blind").HasField("quality")
    client.delete_model("blind")


def test_what_cannot_go_together_is_refused(client: Client, small: str) -> None:
    too_long = Evaluation(window_tokens=CONTEXT + 1)
    wrong = f"context of {CONTEXT} tokens"
    evaluate, quantize = client.evaluate, partial(client.quantize, "base", "new", RTN)
    blind = partial(quantize, skip_evaluation=True)
    for field, words, call in (
        ("gate", "skip_evaluation", partial(blind, gate=QualityGate(max_mean_kl=1))),
        ("evaluation", "skip_evaluation", partial(blind, evaluation=Evaluation())),
        ("evaluation.window_tokens", wrong, partial(quantize, evaluation=too_long)),
        ("evaluation.window_tokens", wrong, partial(evaluate, small, evaluation=too_long)),
        ("against", "base has no parent", partial(evaluate, "base")),
        ("against", "different vocabularies", partial(evaluate, small, against="wider")),
        ("against", "scripted", partial(evaluate, small, against="scripted")),
        ("model", "scripted", partial(evaluate, "scripted", against="base")),
    ):
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            call()
        assert [violation.field for violation in caught.value.violations] == [field]
    # A limit on bytes needs no evaluation.
    gate = QualityGate(max_bytes=1 << 30)
    assert not blind(gate=gate, validate_only=True).id


def lowbit(server: ServerProcess, *arguments: str) -> str:
    """Run the command and return what it printed."""
    command = [str(Path(sys.executable).parent / "lowbit"), "--address", server.address]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_prints_a_table_or_json(server: ServerProcess, small: str) -> None:
    options = ("--max-tokens", "256", "--window", "64")
    found = json.loads(lowbit(server, "evaluate", small, *options, "--json"))
    assert found["tokens"] == 256 - 4
    names = ["mean_kl", "median_kl", "p99_kl", "max_kl", "top1_agreement", "peak_memory_bytes"]
    both = ["perplexity", "disk_bytes", "live_bytes"]
    both += ["prefill_tokens_per_second", "decode_tokens_per_second"]
    for name in (*names, *both, *(f"base_{one}" for one in both)):
        assert isinstance(found[name], int | float), name
        assert found[name] > 0, name
    (server.home.parent / "text.txt").write_text("Other words to be held out. " * 20)
    text = ("--against", "other", "--text", str(server.home.parent / "text.txt"))
    table = lowbit(server, "evaluate", small, *text)
    for words in ("perplexity", "KL p99", "decode tok/s", small, "other", "tokens on cpu"):
        assert words in table


def test_compared_models_share_base_and_text(
    client: Client, server: ServerProcess, small: str, tmp_path: Path
) -> None:
    client.wait_job(client.evaluate(small, evaluation=inline("short text " * 20)).id)
    client.wait_job(client.quantize("base", "eight", scheme("rtn", bits=8)).id)
    client.wait_job(client.quantize("base", "blind", "bf16", skip_evaluation=True).id)
    picture = tmp_path / "out.png"
    names = ("base", "eight", small, "blind")
    found = json.loads(lowbit(server, "compare", *names, "--json", "--plot", str(picture)))
    rows = {row["model"]: row for row in found["models"]}
    assert found["base"] == "base"
    assert list(rows) == list(names)
    assert len({(row["text_digest"], row["base"], row["device"]) for row in rows.values()}) == 1
    assert rows["base"]["mean_kl"] == 0
    assert rows["base"]["perplexity"] == rows[small]["base_perplexity"]
    assert 0 < rows["eight"]["mean_kl"] < rows[small]["mean_kl"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    # All have reports that can be compared now: nothing is measured again.
    before = len(list(client.jobs()))
    table = lowbit(server, "compare", *names)
    assert len(list(client.jobs())) == before
    assert [line.split()[0] for line in table.splitlines()] == ["MODEL", *names]
    for name in ("eight", "blind"):
        client.delete_model(name)


def example(server: ServerProcess, name: str, *arguments: str) -> str:
    """Run an example and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "examples" / name), *arguments],
        env=os.environ | {"LOWBIT_ADDRESS": server.address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_measures(server: ServerProcess, small: str) -> None:
    out = example(server, "evaluate.py", small, "base")
    assert f"{small} against base: perplexity " in out
    assert "tokens/s" in out


def test_the_example_calibrates_on_a_file(server: ServerProcess, client: Client) -> None:
    folder = server.home.parent
    lines = [json.dumps({"text": f"Line {n} of my own text: {n * n}."}) for n in range(1000)]
    (folder / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out = example(server, "calibrate.py", "base", "own", str(folder / "own.jsonl"), "text")
    assert out.startswith("own: perplexity ")
    made = client.get_model("own")
    assert made.scheme == "gptq"
    assert made.calibration_digest
    client.delete_model("own")
