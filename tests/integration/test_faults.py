"""Processes that die in the middle of their work."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lowbit import AsyncClient, Client, ClientOptions, LowbitError, WorkerLostError
from lowbit.v1 import generation_pb2, generation_pb2_grpc, job_pb2, runtime_pb2
from lowbit_server.testing import ServerProcess, scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lowbit import AsyncGenerateStream

DEADLINE_S = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def serving(home: Path, *flags: str, **environment: str) -> ServerProcess:
    """Return a server that may import from beside its home."""
    settings = {f"LOWBIT_{key.upper()}": value for key, value in environment.items()}
    settings["LOWBIT_IMPORT_ROOTS"] = str(home.parent)
    return ServerProcess(home, *flags, environment=settings)


def bring_in(client: Client, source: Path, name: str, *, replicas: int = 1) -> None:
    """Import a scripted model and load it."""
    client.wait_job(client.import_model(name, path=str(source)).id)
    client.load(name, replicas=replicas).wait()


def workers(client: Client) -> dict[str, runtime_pb2.Worker]:
    """Return the workers of the only device by name."""
    return {worker.name: worker for device in client.devices() for worker in device.workers}


def job_processes(server: ServerProcess) -> list[psutil.Process]:
    """Return the job processes that run."""
    children = psutil.Process(server.pid).children()
    return [one for one in children if "lowbit_server.jobs.process" in one.cmdline()]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder for a server of this test only."""
    return tmp_path / "home"


class HealthWatch:
    """Collects what health says of one name."""

    def __init__(self, address: str, name: str) -> None:
        self.seen: list[int] = []
        self._channel = grpc.insecure_channel(address)
        request = health_pb2.HealthCheckRequest(service=name)
        self._call = health_pb2_grpc.HealthStub(self._channel).Watch(request)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self._call:
                self.seen.append(message.status)
        except grpc.RpcError:
            pass

    def close(self) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()


@pytest.fixture
def watches() -> Iterator[list[HealthWatch]]:
    """Health watches that are closed after the test."""
    opened: list[HealthWatch] = []
    yield opened
    for watch in opened:
        watch.close()


async def test_a_killed_worker_fails_its_streams_and_no_others(
    home: Path, watches: list[HealthWatch]
) -> None:
    source = scripted_model(home.parent / "source", step_ms=5.0, context_tokens=100_000)
    with serving(home, "--workers-per-device", "2") as server, Client(server.address) as client:
        bring_in(client, source, "m", replicas=2)
        watches.append(HealthWatch(server.address, ""))
        watches += [HealthWatch(server.address, f"cpu/{index}") for index in (0, 1)]
        until(lambda: all(watch.seen == [SERVING] for watch in watches))
        async with AsyncClient(server.address) as aio:
            streams = [aio.generate("m", "hello", max_tokens=90_000, timeout=60) for _ in range(16)]
            for stream in streams:
                for _ in range(3):
                    await anext(stream)
            assert [one.running_requests for one in workers(client).values()] == [8, 8]
            victim = workers(client)["cpu/0"]
            os.kill(victim.pid, signal.SIGKILL)
            killed = time.monotonic()

            async def drain(stream: AsyncGenerateStream) -> tuple[float, LowbitError | None]:
                """Read until the stream fails, or long enough to see that it goes on."""
                try:
                    while time.monotonic() < killed + 2:
                        await anext(stream)
                except LowbitError as error:
                    return time.monotonic() - killed, error
                return 0.0, None

            ends = await asyncio.gather(*(drain(stream) for stream in streams))
            failed = [(after, error) for after, error in ends if error]
            assert len(failed) == 8, "the other worker's eight go on"
            for after, error in failed:
                assert after < 1.0
                assert isinstance(error, WorkerLostError)
                assert error.code is grpc.StatusCode.INTERNAL
                assert error.metadata["prompt_tokens"] == "5"
                assert int(error.metadata["output_tokens"]) >= 3
        until(lambda: workers(client)["cpu/0"].restarts == 1)
        until(lambda: [len(model.replicas) for model in client.models()] == [2])
        until(lambda: all(one.state == 2 for one in client.get_model("m").replicas))
        assert workers(client)["cpu/0"].pid != victim.pid
        overall, first, second = watches
        until(lambda: first.seen == [SERVING, NOT_SERVING, SERVING])
        assert overall.seen == [SERVING], "one worker was up all the time"
        assert second.seen == [SERVING]
        assert client.generate("m", "ab", max_tokens=4).text() == "abab"


def test_the_only_worker_dies_before_the_first_token(
    home: Path, watches: list[HealthWatch]
) -> None:
    source = scripted_model(home.parent / "source", prefill_ms=60_000)
    with serving(home) as server, Client(server.address) as client:
        bring_in(client, source, "m")
        watches.append(HealthWatch(server.address, "lowbit.v1.GenerationService"))
        until(lambda: watches[0].seen == [SERVING])
        raw = grpc.insecure_channel(server.address)  # the SDK would try again
        request = generation_pb2.GenerateRequest(model="m", text="hello")
        stub = generation_pb2_grpc.GenerationServiceStub(raw)
        call = stub.Generate(request, timeout=DEADLINE_S)
        until(lambda: workers(client)["cpu/0"].running_requests == 1)
        os.kill(workers(client)["cpu/0"].pid, signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        until(lambda: watches[0].seen == [SERVING, NOT_SERVING, SERVING])
        until(lambda: [one.state for one in client.get_model("m").replicas] == [2])
        raw.close()


def test_a_hung_worker_is_replaced(home: Path) -> None:
    faults = [{"kind": "hang", "after_tokens": 2, "if_prompt_has": 0}]
    source = scripted_model(home.parent / "source", step_ms=1.0, faults=faults)
    quick = {"worker_ping_interval_s": "0.2", "worker_hang_timeout_s": "1.5"}
    with serving(home, **quick) as server, Client(server.address) as client:
        bring_in(client, source, "m")
        with pytest.raises(WorkerLostError):
            client.generate("m", token_ids=[0, 40], max_tokens=10, timeout=DEADLINE_S).text()
        until(lambda: workers(client)["cpu/0"].restarts == 1)
        until(lambda: [one.state for one in client.get_model("m").replicas] == [2])
        assert client.generate("m", "ab", max_tokens=4).text() == "abab"


def test_an_engine_error_fails_one_request_only(home: Path) -> None:
    faults = [{"kind": "error", "after_tokens": 2, "if_prompt_has": 0}]
    source = scripted_model(home.parent / "source", step_ms=1.0, faults=faults)
    with serving(home) as server, Client(server.address) as client:
        bring_in(client, source, "m")
        with pytest.raises(LowbitError) as caught:
            client.generate("m", token_ids=[0, 40], max_tokens=10).text()
        assert caught.value.code is grpc.StatusCode.INTERNAL
        assert client.generate("m", "ab", max_tokens=4).text() == "abab"
        assert workers(client)["cpu/0"].restarts == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda one: one.name)
def test_jobs_go_on_by_themselves_after_a_restart(home: Path, number: signal.Signals) -> None:
    source = scripted_model(home.parent / "source")
    with serving(home) as server, Client(server.address) as client:
        running = client.import_model("running", path=str(source))
        waiting = client.import_model("waiting", path=str(source))
        stream = client.watch_job(running.id)
        until(lambda: bool(job_processes(server)))
        (process,) = job_processes(server)
        process.suspend()  # so that it is not done before the server is gone
        while (event := next(stream)).job.state != job_pb2.JOB_STATE_RUNNING:
            pass
        server.signal(number)
        server.wait()
        stream.close()
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert list((home / "models").iterdir()) == []
    with serving(home) as server, Client(server.address) as client:
        rest = list(client.watch_job(running.id, event.sequence))
        assert [one.sequence for one in rest] == [
            *range(event.sequence + 1, event.sequence + len(rest) + 1)
        ]
        states = dict.fromkeys(one.job.state for one in rest)
        paused = [job_pb2.JOB_STATE_PAUSED] if number is signal.SIGTERM else []
        assert list(states) == [
            *paused,
            job_pb2.JOB_STATE_QUEUED,
            job_pb2.JOB_STATE_RUNNING,
            job_pb2.JOB_STATE_SUCCEEDED,
        ]
        assert client.wait_job(waiting.id).state == job_pb2.JOB_STATE_SUCCEEDED
        assert [one.name for one in client.models()] == ["running", "waiting"]
        assert not any((home / "staging").iterdir())


def test_sigterm_finishes_running_streams_and_admits_no_more(home: Path) -> None:
    source = scripted_model(home.parent / "source", step_ms=5.0)
    with serving(home) as server, Client(server.address) as client:
        bring_in(client, source, "m")
        streams = [client.generate("m", "ab", max_tokens=200, timeout=60) for _ in range(16)]
        for stream in streams:
            next(stream)
        server.signal(signal.SIGTERM)
        until(lambda: client.info().draining)
        impatient = ClientOptions(max_attempts=1)
        with Client(server.address, impatient) as late, pytest.raises(LowbitError) as refused:
            late.generate("m", "ab").text()
        assert refused.value.reason == "SHUTTING_DOWN"
        assert [stream.text() for stream in streams] == ["ab" * 100] * 16
        assert server.wait() == 0
    assert not (home / "address").exists()


def test_sigterm_cuts_streams_after_the_grace_period(home: Path) -> None:
    source = scripted_model(home.parent / "source", step_ms=5.0, context_tokens=100_000)
    with serving(home, drain_grace_s="0.5") as server, Client(server.address) as client:
        bring_in(client, source, "m")
        stream = client.generate("m", "ab", max_tokens=90_000, timeout=60)
        next(stream)
        server.signal(signal.SIGTERM)
        with pytest.raises(LowbitError):
            stream.text()
        assert server.wait() == 0


def test_a_second_signal_ends_at_once(home: Path) -> None:
    source = scripted_model(home.parent / "source", step_ms=5.0, context_tokens=100_000)
    with serving(home) as server, Client(server.address) as client:
        bring_in(client, source, "m")
        pids = [worker.pid for worker in workers(client).values()]
        stream = client.generate("m", "ab", max_tokens=90_000, timeout=60)
        next(stream)
        server.signal(signal.SIGTERM)
        until(lambda: client.info().draining)
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 2
        until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        stream.close()
