"""The server of a suite and all that scenarios may do to it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import psutil

from lowbit import Client, ClientOptions, TlsOptions
from lowbit.v1 import model_pb2, runtime_pb2
from lowbit_server.testing import ServerProcess, scripted_model
from tests.certificates import Authority
from tests.conformance.proxy import Proxy
from tests.conformance.schema import ROOT, plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DEADLINE_S = 60.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until a condition is true and return what it gave; raise TimeoutError naming it."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come in {DEADLINE_S:g} s")
        time.sleep(0.01)  # between two looks at what cannot be awaited
    return found


class RefusingStage:
    """A server that refuses every Generate (refusing.py)."""

    def __enter__(self) -> Self:
        """Start it."""
        command = [sys.executable, "-m", "tests.conformance.refusing"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it."""
        with self._process:  # closes its output
            self._process.kill()

    def settle(self) -> None:
        """Do nothing: it has no state."""


class Stage:
    """A real server with the models that its suite names."""

    def __init__(self, folder: Path, server: Any) -> None:
        """Describe it; `with` starts it. All files go into `folder`."""
        self._folder = folder
        self._spec = server
        self._sources = folder / "sources"
        self._sources.mkdir(parents=True)
        self._exit = ExitStack()
        self._process: ServerProcess
        self._frozen: list[psutil.Process] = []
        self._ended = False

    def __enter__(self) -> Self:
        """Start the server and bring its models in."""
        self._start("127.0.0.1:0")
        self.address = self._process.address
        self._admin = self._exit.enter_context(Client(self.address, self._options()))
        until(self._ready, "a worker")
        for model in self._spec.models:
            path = self._source(model.name, model.context_tokens, plain(model.script))
            self._admin.wait_job(self._admin.import_model(model.name, path=path).id)
            if not model.unloaded:
                self._admin.load(model.name).wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the server and what it left."""
        self._exit.close()
        self._process.kill()
        self._kill_frozen()

    def settle(self) -> None:
        """Wait until nothing runs and the suite's models are as they were in the beginning."""
        if not self._ended:
            until(self._ready, "a worker")
            for model in self._spec.models:
                if not model.unloaded:
                    until(lambda name=model.name: self._live(name), f"model {model.name}")
            until(lambda: self.running() == 0, "an idle worker")

    def running(self) -> int:
        """Return the requests that the workers hold."""
        return sum(worker.running_requests for worker in self._workers())

    def log(self, request_id: str) -> list[dict[str, Any]]:
        """Return the lines of ended calls of a request."""
        lines = self._process.log()
        return [one for one in lines if one["event"] == "rpc" and one["request_id"] == request_id]

    @cached_property
    def proxy(self) -> Proxy:
        """The proxy in front of the server."""
        return self._exit.enter_context(Proxy(self.address))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Files that scenarios name: ca, certificate, key, and the same with other_ before."""
        found = {}
        for prefix in ("", "other_"):
            authority = Authority(self._folder, f"{prefix}ca")
            client = authority.issue(f"{prefix}client")
            found[f"{prefix}ca"] = authority.file
            found[f"{prefix}certificate"], found[f"{prefix}key"] = client.certificate, client.key
            if not prefix:
                server = authority.issue("server")
                found["server_certificate"], found["server_key"] = server.certificate, server.key
        return found

    def source(self, name: str) -> str:
        """Return the path of a source folder of a scripted model, made when it is missing."""
        return self._source(name, 0, {})

    def weights(self, name: str) -> str:
        """Return the path of a source folder of a tiny model with random weights."""
        folder = self._sources / name
        if not folder.exists():
            # Imported here, because they import torch.
            from transformers.utils import logging  # noqa: PLC0415

            from tests.models.quantkit import random_source  # noqa: PLC0415

            logging.disable_progress_bar()
            random_source(folder, model_type="llama")
        return str(folder)

    # What scenarios do.

    def kill_worker(self) -> None:
        """Kill the worker processes."""
        for worker in self._workers():
            psutil.Process(worker.pid).kill()

    def drain(self) -> None:
        """Send SIGTERM and wait until the server has noticed."""
        self._ended = True
        self._process.signal(signal.SIGTERM)
        until(lambda: any(one["event"] == "draining" for one in self._process.log()), "the drain")

    def restart(self) -> None:
        """Kill the server as a crash would and start it again at the same port."""
        self._process.kill()
        self._kill_frozen()
        self._start(self.address)

    def replace(self) -> None:
        """End the server in good order and start it again at the same port."""
        self._process.signal(signal.SIGTERM)
        self._process.wait()
        self._kill_frozen()
        self._start(self.address)

    def break_connections(self) -> None:
        """Break the connections through the proxy."""
        if not self.proxy.break_all():
            raise RuntimeError("no connection went through the proxy")

    def freeze_job(self) -> None:
        """Stop the job processes as soon as there is one."""
        self._frozen = until(self._job_processes, "a job process")
        for process in self._frozen:
            process.suspend()

    def thaw_job(self) -> None:
        """Let the stopped processes go on."""
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):  # the job was cancelled
                process.resume()
        self._frozen = []

    def _start(self, listen: str) -> None:
        settings = {f"LOWBIT_{name.upper()}": text for name, text in self._spec.settings.items()}
        settings["LOWBIT_IMPORT_ROOTS"] = str(self._sources)
        # Several threads would wait for each other where the machine is busy with other things.
        settings["OMP_NUM_THREADS"] = settings["LOWBIT_THREADS_PER_WORKER"] = "1"
        if self._spec.tls:
            settings["LOWBIT_TLS_CERTIFICATE"] = str(self.files["server_certificate"])
            settings["LOWBIT_TLS_KEY"] = str(self.files["server_key"])
        if self._spec.client_certificates:
            settings["LOWBIT_TLS_CLIENT_CA"] = str(self.files["ca"])
        if self._spec.tokens:
            tokens = self._folder / "tokens"
            tokens.write_text("\n".join(self._spec.tokens))
            settings["LOWBIT_TOKENS_FILE"] = str(tokens)
        home = self._folder / "home"
        self._process = ServerProcess(home, "--listen", listen, environment=settings).start()

    def _options(self) -> ClientOptions:
        names = ("ca", "certificate", "key")
        tls = TlsOptions(**{name: self.files[name].read_bytes() for name in names})
        token = self._spec.tokens[0] if self._spec.tokens else None
        return ClientOptions(tls=tls if self._spec.tls else None, token=token)

    def _source(self, name: str, context_tokens: int, script: dict[str, Any]) -> str:
        folder = self._sources / name
        if not folder.exists():
            scripted_model(folder, context_tokens=context_tokens or 4096, **script)
        return str(folder)

    def _workers(self) -> list[runtime_pb2.Worker]:
        return [worker for device in self._admin.devices() for worker in device.workers]

    def _ready(self) -> bool:
        workers = self._workers()
        return all(one.state == runtime_pb2.WORKER_STATE_READY for one in workers)

    def _live(self, model: str) -> bool:
        replicas = self._admin.get_model(model).replicas
        return [one.state for one in replicas] == [model_pb2.REPLICA_STATE_LIVE]

    def _job_processes(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self._process.pid).children():
            try:
                if "lowbit_server.jobs.process" in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def _kill_frozen(self) -> None:
        for process in self._frozen:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._frozen = []
