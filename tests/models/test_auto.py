"""Scheme auto through a real server, on a tiny random model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from lowbit import Client, InvalidArgumentError, JobFailedError, scheme
from lowbit.v1 import job_pb2
from lowbit.v1.quantization_pb2 import Calibration, Evaluation, LayerBits, QualityGate
from lowbit_server.testing import ServerProcess
from tests.models.quantkit import random_source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowbit.v1.quality_pb2 import Trial

LAYERS = 4
CALIBRATION = Calibration(samples=8, sequence_tokens=64)
EVALUATION = Evaluation(max_tokens=256, window_tokens=64)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("auto")
    sizes = {"num_hidden_layers": LAYERS, "max_position_embeddings": 128}
    llama = {"model_type": "llama", "initializer_range": 0.1, "tie_word_embeddings": True}
    random_source(folder / "base", torch.bfloat16, **llama, **sizes)
    granite = {"model_type": "granite", "initializer_range": 0.1, "max_position_embeddings": 128}
    random_source(folder / "other", torch.bfloat16, **granite, num_hidden_layers=2)
    environment = {"LOWBIT_IMPORT_ROOTS": str(folder), "LOWBIT_MAX_RUNNING_JOBS": "2"}
    with ServerProcess(folder / "home", environment=environment) as server:
        with Client(server.address) as client:
            jobs = [
                client.import_model(name, path=str(folder / name)) for name in ("base", "other")
            ]
            for job in jobs:
                client.wait_job(job.id)
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def live(client: Client, kept: int = 0, **options: Any) -> int:
    """Return what a gptq copy with some layers at 8 bit takes, estimated with a little room."""
    wanted = scheme("gptq", **options)
    wanted.gptq.layers.extend(LayerBits(layer=layer, bits=8) for layer in range(kept))
    return round(1.01 * client.estimate_quantization("base", wanted).devices[0].live_bytes)


def auto(client: Client, target: str, budget: int, source: str = "base", **limits: Any) -> Any:
    return client.quantize(
        source,
        target,
        scheme("auto", max_live_bytes=budget),
        calibration=CALIBRATION if source == "base" else None,
        evaluation=EVALUATION,
        gate=QualityGate(**limits) if limits else None,
    )


@pytest.fixture(scope="module")
def failed(client: Client) -> job_pb2.Job:
    """A job with room for all but one layer at 8 bit, and a gate that nothing keeps."""
    job = auto(client, "never", live(client, kept=LAYERS - 1), max_mean_kl=1e-9)
    with pytest.raises(JobFailedError) as caught:
        client.wait_job(job.id)
    return caught.value.job


def made(job: job_pb2.Job) -> list[Trial]:
    return [trial for trial in job.trials if trial.HasField("quality")]


def test_when_nothing_keeps_the_gate_all_that_was_tried_is_told(
    client: Client, server: ServerProcess, failed: job_pb2.Job
) -> None:
    assert failed.scheme == "auto"
    refused = [trial for trial in failed.trials if not trial.HasField("quality")]
    assert [trial.scheme.split()[0] for trial in refused][:2] == ["int8", "gptq"]
    assert all(trial.verdict.startswith("not made: ") for trial in refused)
    tried = made(failed)
    names = [trial.scheme.split()[0] for trial in tried]
    assert names == ["gptq", "awq", "nf4", "gptq"]
    assert "layers=" in tried[-1].scheme
    assert tried[-1].scheme.count(":8") == LAYERS - 1
    for trial in tried:
        assert trial.verdict.startswith("misses the gate: max_mean_kl 1e-09: measured ")
        assert f"{trial.scheme}: {trial.verdict}" in failed.error.message
        assert 0 < trial.live_bytes <= live(client, kept=LAYERS - 1)
        assert trial.quality.live_bytes == trial.live_bytes
    assert job_pb2.JobState.Name(failed.state) == "JOB_STATE_FAILED"
    assert "never" not in {model.name for model in client.models()}
    for folder in ("staging", "checkpoints"):
        assert not list((server.home / folder).glob(f"{failed.id}*"))
    # They came one by one.
    lengths = [len(made(event.job)) for event in client.watch_job(failed.id)]
    assert sorted(set(lengths)) == [0, 1, 2, 3, 4]
    assert lengths == sorted(lengths)


def test_a_large_budget_gives_8_bit_and_a_smaller_one_4(
    client: Client, server: ServerProcess
) -> None:
    base = client.get_model("base")
    example = Path(__file__).parents[2] / "examples" / "auto.py"
    done = subprocess.run(
        [sys.executable, str(example), "base", "eight", str(base.disk_bytes), "9"],
        env=os.environ | {"LOWBIT_ADDRESS": server.address},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    (eight,) = (job for job in client.jobs() if job.model == "eight")
    live_bytes = eight.trials[0].live_bytes
    assert done.stdout == f"int8: {live_bytes} bytes live, chosen\n"
    command = [str(Path(sys.executable).parent / "lowbit"), "--address", server.address]
    command += ["quantize", "base", "four", "--scheme", "auto", "--json"]
    command += ["--budget", f"{live(client, group_size=32) / 1000}KB"]
    command += ["--calibration-samples", "8", "--calibration-tokens", "64"]
    command += ["--eval-tokens", "256", "--min-top1-agreement", "0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert client.get_model("eight").scheme == "int8"
    assert not client.get_model("eight").calibration_digest
    four = client.get_model("four")
    trials = json.loads(done.stdout)["trials"]
    assert trials[-1]["scheme"] == "gptq bits=4 group_size=32"
    assert trials[-1]["verdict"] == "chosen"
    assert all(one["verdict"].startswith("not made: ") for one in trials[:-1])
    assert four.scheme_options.gptq.group_size == 32
    assert four.calibration_digest
    assert four.quality.live_bytes == int(trials[-1]["live_bytes"])
    client.load("four").wait()
    client.unload("four")
    shown = subprocess.run(
        [*command[:3], "jobs", "show", eight.id], capture_output=True, text=True, check=True
    )
    assert "VERDICT" in shown.stdout


def test_layers_stay_at_8_bit_where_one_scheme_misses_the_gate(
    client: Client, server: ServerProcess, failed: job_pb2.Job
) -> None:
    """And a job whose process is killed within its second candidate makes the same bytes."""
    *single, mixed = (trial.quality.mean_kl for trial in made(failed))
    assert mixed < min(single)
    budget, gate = live(client, kept=LAYERS - 1), (mixed + min(single)) / 2
    killed, whole = (auto(client, name, budget, max_mean_kl=gate) for name in ("killed", "whole"))
    with client.watch_job(killed.id) as events:
        for event in events:
            progress = event.job.progress
            if made(event.job) and progress.phase == job_pb2.JOB_PHASE_QUANTIZE and progress.done:
                break
    first = event.job
    for child in psutil.Process(server.pid).children():
        if any(killed.id in part for part in child.cmdline()):
            child.kill()
    ended = [client.wait_job(job.id) for job in (killed, whole)]
    for job in ended:
        assert [one.scheme for one in job.trials] == [one.scheme for one in failed.trials]
        assert [one.verdict for one in job.trials][-1] == "chosen"
        for own, other in zip(made(job), made(failed), strict=True):
            assert own.quality.mean_kl == other.quality.mean_kl
    # What was measured before the kill was not measured again.
    assert made(ended[0])[0] == made(first)[0]
    models = [client.get_model(name) for name in ("killed", "whole")]
    assert models[0].revision == models[1].revision
    assert len(models[0].scheme_options.gptq.layers) == LAYERS - 1
    assert models[0].quality.mean_kl <= gate
    assert not list((server.home / "checkpoints").iterdir())


def test_other_architectures_get_what_applies(client: Client) -> None:
    (device,) = client.estimate_quantization("other", scheme("rtn", group_size=32)).devices
    job = auto(client, "granite", round(1.01 * device.live_bytes), source="other")
    job = client.wait_job(job.id)
    assert job.trials[-1].scheme == "rtn bits=4 group_size=32"
    assert {trial.scheme.split()[0] for trial in job.trials} == {"int8", "rtn"}


def test_bits_of_single_layers_can_be_asked_for(client: Client) -> None:
    wanted = scheme("gptq")
    wanted.gptq.layers.append(LayerBits(layer=LAYERS - 1, bits=8))
    assert live(client) < client.estimate_quantization("base", wanted).devices[0].live_bytes
    assert not client.quantize("base", "new", wanted, validate_only=True).id
    for numbers in ([LAYERS], [0, 0]):
        del wanted.gptq.layers[:]
        wanted.gptq.layers.extend(LayerBits(layer=number, bits=8) for number in numbers)
        with pytest.raises(InvalidArgumentError, match="decoder layers are 0 to 3") as caught:
            client.quantize("base", "new", wanted)
        assert caught.value.violations[0].field == "scheme.gptq.layers"


def test_what_cannot_be_is_refused_before_work_starts(client: Client) -> None:
    budget = scheme("auto", max_live_bytes=1000)
    roomy = scheme("auto", max_live_bytes=1 << 30)
    for field, words, wanted, options in (
        ("scheme.auto.max_live_bytes", "the smallest copy, .* takes .* bytes live", budget, {}),
        ("gate.max_bytes", "on disk", roomy, {"gate": QualityGate(max_bytes=10)}),
        ("skip_evaluation", "has to measure", roomy, {"skip_evaluation": True}),
        ("gate.keep_artifact", "trial", roomy, {"gate": QualityGate(keep_artifact=True)}),
    ):
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            client.quantize("base", "refused", wanted, **options)
        assert [violation.field for violation in caught.value.violations] == [field]
    with pytest.raises(InvalidArgumentError, match="several schemes"):
        client.estimate_quantization("base", roomy)
    with pytest.raises(InvalidArgumentError, match="no calibration text"):
        client.quantize("other", "refused", roomy, calibration=CALIBRATION)
