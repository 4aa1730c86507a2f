"""Wiring, and the order of start, drain and stop."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from lowbit.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    quantization_pb2,
    quantization_pb2_grpc,
    runtime_pb2,
    runtime_pb2_grpc,
)
from lowbit_server import collector
from lowbit_server.config import read_tokens
from lowbit_server.grammar.checker import GrammarChecker
from lowbit_server.jobs.manager import JobManager
from lowbit_server.jobs.records import JobStore
from lowbit_server.pool.launcher import LocalLauncher
from lowbit_server.pool.pool import Pool
from lowbit_server.pool.worker import WorkerState
from lowbit_server.rpc.authentication import TokenInterceptor
from lowbit_server.rpc.generation import GenerationService
from lowbit_server.rpc.interceptors import PublicInterceptor
from lowbit_server.rpc.jobs import JobService
from lowbit_server.rpc.models import ModelService
from lowbit_server.rpc.quantization import QuantizationService
from lowbit_server.rpc.reflection import add_reflection
from lowbit_server.rpc.runtime import RuntimeService
from lowbit_server.scheduler import Scheduler
from lowbit_server.store.artifacts import ArtifactStore
from lowbit_server.store.catalog import Catalog
from lowbit_server.store.database import Database
from lowbit_server.tokenizer import Tokenizers

if TYPE_CHECKING:
    from lowbit_server.config import Config

log = structlog.get_logger()

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (generation_pb2, "GenerationService"),
        (model_pb2, "ModelService"),
        (quantization_pb2, "QuantizationService"),
        (job_pb2, "JobService"),
        (runtime_pb2, "RuntimeService"),
    )
)
KEEPALIVE_MS = 30_000
CLIENT_PING_MS = 10_000
"""Clients may ping this often, with or without a call under way."""
CLOSE_GRACE_S = 1.0
"""After the drain only watchers are left; they get this long to see the end."""


class Server:
    """One process of the service: the public API and everything behind it."""

    def __init__(self, config: Config) -> None:
        """Wire the parts together; nothing runs yet. Makes the store's folder."""
        config.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._config = config
        self._database = Database(config.home / "lowbit.db")
        self._catalog = Catalog(ArtifactStore(config.home), self._database)
        records = JobStore(self._database)
        self._jobs = JobManager(config, self._catalog, records)
        self._pool = Pool(config, _launcher(config))
        self._scheduler = Scheduler(config, self._pool)
        self._grammars = GrammarChecker()
        self._health = health.aio.HealthServicer()
        self._grpc = grpc.aio.server(
            interceptors=_interceptors(config), options=_grpc_options(config)
        )
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(
            GenerationService(self._catalog, Tokenizers(), self._scheduler, self._grammars),
            self._grpc,
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelService(config, self._catalog, self._pool, self._jobs, self._scheduler), self._grpc
        )
        quantization_pb2_grpc.add_QuantizationServiceServicer_to_server(
            QuantizationService(config, self._catalog, self._jobs, self._scheduler), self._grpc
        )
        job_pb2_grpc.add_JobServiceServicer_to_server(
            JobService(self._jobs, records, self._scheduler), self._grpc
        )
        runtime_pb2_grpc.add_RuntimeServiceServicer_to_server(
            RuntimeService(config, self._pool, self._scheduler, self._jobs, datetime.now(UTC)),
            self._grpc,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        add_reflection([*SERVICES, health.SERVICE_NAME], self._grpc)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain and stop; a second signal ends at once."""
        await self.start()
        collector.freeze()
        await _wait_for_signal()
        await self.drain()
        await self.stop()

    async def start(self) -> str:
        """Start everything and return the address that is served, HOST:PORT."""
        # First the store, since a job may have been published by a server that died before
        # it said so; then the jobs and the workers; the port opens last.
        await self._catalog.start()
        await self._jobs.start()
        await self._pool.start()
        self._tasks = [
            asyncio.create_task(self._report_health()),
            asyncio.create_task(self._warm_up()),
        ]
        host, _ = self._config.listen.rsplit(":", 1)
        credentials = _credentials(self._config)
        if credentials is None:
            port = self._grpc.add_insecure_port(self._config.listen)
        else:
            port = self._grpc.add_secure_port(self._config.listen, credentials)
        await self._grpc.start()
        address = f"{host}:{port}"
        self._publish_address(address)
        log.info(
            "serving",
            address=address,
            tls=credentials is not None,
            tokens=self._config.tokens_file is not None,
            devices=self._config.devices,
            pid=os.getpid(),
        )
        return address

    async def drain(self) -> None:
        """Admit nothing new and let the running streams finish."""
        log.info("draining", running=self._scheduler.admitted, grace_s=self._config.drain_grace_s)
        self._scheduler.draining = True
        self._pool.changed.notify()  # health turns NOT_SERVING
        await self._scheduler.wait_idle(self._config.drain_grace_s)

    async def stop(self) -> None:
        """Stop everything, in the reverse order of start: no call may see a part that is gone."""
        for task in self._tasks:
            task.cancel()
        await self._grpc.stop(CLOSE_GRACE_S)
        await self._grammars.stop()
        await self._jobs.stop()
        await self._pool.stop()
        self._database.close()
        (self._config.home / "address").unlink(missing_ok=True)
        log.info("stopped")

    async def _report_health(self) -> None:
        """Keep grpc.health.v1 true: overall, per service, and per worker by its name."""
        status = health_pb2.HealthCheckResponse
        while True:
            changed = self._pool.changed.next()
            open_ = self._pool.ready and not self._scheduler.draining
            for name in ("", *SERVICES):
                await self._health.set(name, status.SERVING if open_ else status.NOT_SERVING)
            for worker in self._pool.workers:
                up = worker.state is WorkerState.READY and not self._scheduler.draining
                await self._health.set(worker.name, status.SERVING if up else status.NOT_SERVING)
            await changed.wait()

    async def _warm_up(self) -> None:
        """Have the workers ready for weights as soon as there are models that have some."""
        while True:
            changed = self._catalog.changed.next()
            if any(one.scheme.kind != "scripted" for one in self._catalog.manifests()):
                self._pool.warm_up()
                return
            await changed.wait()

    def _publish_address(self, address: str) -> None:
        """Write the address that was bound to HOME/address, whole or not at all."""
        part = self._config.home / "address.part"
        part.write_text(address + "\n")
        part.replace(self._config.home / "address")


async def _wait_for_signal() -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            log.warning("second signal: ending at once", signal=number)
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await stopping.wait()


def _launcher(config: Config) -> LocalLauncher:
    workers = len(config.devices) * config.workers_per_device
    cores = len(os.sched_getaffinity(0))
    return LocalLauncher(
        config.home / "run",
        threads=config.threads_per_worker or max(1, cores // workers),
        max_running=config.max_running_requests,
        kv_cache_bytes=config.kv_cache_bytes,
    )


def _interceptors(config: Config) -> list[grpc.aio.ServerInterceptor]:
    tokens = config.tokens_file
    first = [] if tokens is None else [TokenInterceptor(read_tokens(tokens))]
    return [*first, PublicInterceptor()]


def _credentials(config: Config) -> grpc.ServerCredentials | None:
    """Return the credentials of TLS, mutual TLS where clients need a certificate; or None."""
    if config.tls_key is None or config.tls_certificate is None:
        return None
    client_ca = None if config.tls_client_ca is None else config.tls_client_ca.read_bytes()
    return grpc.ssl_server_credentials(
        [(config.tls_key.read_bytes(), config.tls_certificate.read_bytes())],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )


def _grpc_options(config: Config) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a helper
        # A dead client is noticed although it sends nothing ...
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_MS // 3),
        ("grpc.keepalive_permit_without_calls", 1),
        # ... and clients may look after us in the same way during long silent calls.
        ("grpc.http2.min_ping_interval_without_data_ms", CLIENT_PING_MS),
        ("grpc.http2.max_ping_strikes", 0),
    ]
