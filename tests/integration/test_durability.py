"""Jobs and servers that are killed at random moments make the same bytes as undisturbed ones."""

from __future__ import annotations

import json
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from lowbit import Client, scheme
from lowbit.v1 import job_pb2 as pb
from lowbit.v1.quantization_pb2 import Calibration, Evaluation
from lowbit_server.testing import ServerProcess
from tests.models.quantkit import random_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Two jobs at a time, one core for each: threads that wait for each other take turns badly.
SERVER_ENVIRONMENT = {"LOWBIT_MAX_RUNNING_JOBS": "2", "OMP_NUM_THREADS": "1"}
LAYERS = 16
SEED = random.SystemRandom().randrange(2**32)
# Scheme, and what else its jobs are asked with.
CALIBRATION = Calibration(samples=16, sequence_tokens=64)
SCHEMES: dict[str, dict[str, Any]] = {"gptq": {"calibration": CALIBRATION}, "nf4": {}}
EVALUATION = Evaluation(max_tokens=640, window_tokens=64)
# A moment is a phase, how many of its units are done, and how much later, seconds.
Moment = tuple[str, int, float]
PHASES = [name.removeprefix("JOB_PHASE_").lower() for name in pb.JobPhase.keys()]  # noqa: SIM118


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many small layers."""
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 256, "intermediate_size": 512}
    folder = tmp_path_factory.mktemp("durable") / "source"
    return random_source(folder, model_type="llama", tie_word_embeddings=True, **sizes)


@pytest.fixture(scope="module")
def base(service: Any, source: Path) -> str:
    """That model in the store of the module's server."""
    source.rename(service.sources / "base")
    return service.import_float("base", service.sources / "base")


@pytest.fixture(scope="module")
def undisturbed(service: Any, base: str) -> dict[str, dict[str, bytes]]:
    """What each scheme's job makes when nothing happens to it."""
    jobs = {name: quantize(service.client, name, f"undisturbed-{name}") for name in SCHEMES}
    for job in jobs.values():
        service.client.wait_job(job.id)
    return {name: content(service.server.home, f"undisturbed-{name}") for name in SCHEMES}


def quantize(client: Client, name: str, target: str) -> pb.Job:
    return client.quantize("base", target, scheme(name), evaluation=EVALUATION, **SCHEMES[name])


def content(home: Path, name: str) -> dict[str, bytes]:
    """Return the files of a model, without what differs from run to run."""
    files = {path.name: path.read_bytes() for path in (home / "models" / name).iterdir()}
    manifest = json.loads(files["lowbit.json"])
    manifest.pop("name")
    manifest.pop("create_time")
    measured = ("per_second", "live_bytes", "peak_memory_bytes")
    manifest["quality"] = {
        key: value for key, value in manifest["quality"].items() if not key.endswith(measured)
    }
    return files | {"lowbit.json": json.dumps(manifest).encode()}


def process_of(server: ServerProcess, job: pb.Job, but: int = 0) -> psutil.Process | None:
    """Return the process of a job, unless it is the one with a given id."""
    try:
        for child in psutil.Process(server.pid).children():
            if child.pid != but and any(job.id in part for part in child.cmdline()):
                return child
    except psutil.Error:
        pass  # it ended between two looks
    return None


def wait_for(client: Client, job: pb.Job, moment: Moment, after: int) -> list[pb.WatchJobResponse]:
    """Read a job's events behind a sequence number until a moment has come."""
    phase, done, delay_s = moment
    seen: list[pb.WatchJobResponse] = []
    # Only what the process of now tells counts, and it gets on by a block.
    old = client.get_job(job.id)
    wanted = (PHASES.index(phase), done)
    if phase == "quantize":
        wanted = max(wanted, (old.progress.phase, old.progress.done + 1))
    if phase != PHASES[0]:
        with client.watch_job(job.id, after) as events:
            for event in events:
                seen.append(event)
                assert event.job.state in {
                    pb.JOB_STATE_QUEUED,
                    pb.JOB_STATE_RUNNING,
                }, event.job
                progress = event.job.progress
                fresh = event.sequence > old.sequence and progress != old.progress
                if fresh and (progress.phase, progress.done) >= wanted:
                    break
    time.sleep(delay_s)  # part of the moment
    return seen


def moments(rng: random.Random, early: int, quantizing: int, late: int) -> list[Moment]:
    """Return random moments: before any progress, in different blocks, and behind the last."""

    def delay_s() -> float:
        return rng.uniform(0, 0.03)

    blocks = sorted(rng.sample(range(1, LAYERS - 1), quantizing))
    found: list[Moment] = [("quantize", block, delay_s()) for block in blocks]
    # No two of these in a row: a job whose processes get nowhere is given up.
    for place in sorted(rng.sample(range(quantizing), early), reverse=True):
        found.insert(place, ("unspecified", 0, rng.uniform(0, 2.0)))
    found.append(("save", rng.randrange(LAYERS), delay_s()))
    found += [("evaluate", rng.randrange(4), delay_s()) for _ in range(late - 1)]
    return found


def for_each_scheme(work: Callable[[str, random.Random], int]) -> int:
    """Do work for all schemes at the same time; return the sum of what it returns."""
    print(f"seed {SEED}")  # noqa: T201 - shown when it fails
    with ThreadPoolExecutor(len(SCHEMES)) as threads:
        return sum(threads.map(lambda name: work(name, random.Random(f"{SEED}-{name}")), SCHEMES))


def test_killed_job_processes(
    service: Any, undisturbed: Any, eventually: Callable[..., Any]
) -> None:
    """Twenty kills, ten of a job of each scheme."""

    def killed(name: str, rng: random.Random) -> int:
        kills = pid = 0
        with Client(service.server.address) as client:
            job = quantize(client, name, f"killed-{name}")
            for moment in moments(rng, early=4, quantizing=4, late=2):
                process = eventually(lambda pid=pid: process_of(service.server, job, but=pid))
                pid = process.pid
                wait_for(client, job, moment, client.get_job(job.id).sequence)
                process.kill()
                kills += 1
            client.wait_job(job.id)
        assert content(service.server.home, f"killed-{name}") == undisturbed[name]
        return kills

    assert for_each_scheme(killed) == 20
    assert not list((service.server.home / "checkpoints").iterdir())


def test_killed_servers(service: Any, undisturbed: Any, tmp_path: Path) -> None:
    """Ten kills, five of a server that runs a job of each scheme, which is watched through all."""

    def killed(name: str, rng: random.Random) -> int:
        home = tmp_path / name
        shutil.copytree(service.server.home / "models" / "base", home / "models" / "base")
        server = ServerProcess(home, environment=SERVER_ENVIRONMENT).start()
        kills = 0
        seen: list[pb.WatchJobResponse] = []
        try:
            with Client(server.address) as client:
                job = quantize(client, name, "twice")
            for moment in moments(rng, early=1, quantizing=2, late=2):
                with Client(server.address) as client:
                    seen += wait_for(client, job, moment, seen[-1].sequence if seen else 0)
                server.kill()
                kills += 1
                server.start()
            with Client(server.address) as client:
                seen += client.watch_job(job.id, seen[-1].sequence)
                assert seen[-1].job.state == pb.JOB_STATE_SUCCEEDED
                assert seen == list(client.watch_job(job.id))
            assert [one.sequence for one in seen] == list(range(1, len(seen) + 1))
            assert content(home, "twice") == undisturbed[name]
            assert not list((home / "checkpoints").iterdir())
            assert not list((home / "staging").iterdir())
        finally:
            server.kill()
        return kills

    assert for_each_scheme(killed) == 10


def ended(client: Client, job: pb.Job) -> pb.Job:
    """Wait for a job's end and return it."""
    *_, last = client.watch_job(job.id)
    return last.job


def test_a_cancelled_job_goes_on_when_it_is_resumed(service: Any, undisturbed: Any) -> None:
    job = quantize(service.client, "gptq", "cancelled")
    seen = wait_for(service.client, job, ("quantize", 5, 0.0), 0)
    asked = time.monotonic()
    service.client.cancel_job(job.id)
    cancelled = ended(service.client, job)
    assert time.monotonic() - asked < 2
    assert cancelled.state == pb.JOB_STATE_CANCELLED
    assert cancelled.resumable
    assert (service.server.home / "checkpoints" / job.id).is_dir()
    assert not list((service.server.home / "staging").iterdir())
    service.client.resume_job(job.id)
    rest = list(service.client.watch_job(job.id, cancelled.sequence))
    assert rest[-1].job.state == pb.JOB_STATE_SUCCEEDED
    fresh = [one.job.progress for one in rest if one.job.progress != cancelled.progress]
    begun = next(one.done for one in fresh if one.total)
    assert begun >= seen[-1].job.progress.done
    assert content(service.server.home, "cancelled") == undisturbed["gptq"]
    assert not list((service.server.home / "checkpoints").iterdir())
