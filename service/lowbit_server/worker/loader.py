"""Brings models onto the device beside the running step loop."""

from __future__ import annotations

from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING

import structlog

from lowbit.v1.model_pb2 import LoadPhase
from lowbit_server import collector
from lowbit_server.engine.scripted import ScriptedConfig, ScriptedEngine
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest
from lowbit_server.worker.inbox import LoadAdvanced, LoadFailed, LoadSucceeded, Ticket
from lowbit_server.worker.memory import page_out_cuda, release_memory

if TYPE_CHECKING:
    from lowbit_server.engine.engine import Engine
    from lowbit_server.grammar.matcher import Vocabulary
    from lowbit_server.worker.device import Cpu, Cuda
    from lowbit_server.worker.inbox import Inbox
    from lowbit_server.worker.settings import Settings

READ_CHUNK_BYTES = 16 << 20


class LoadStoppedError(Exception):
    """Nobody wants the model any more."""


class Loader:
    """Loads one model at a time and puts the news into the inbox."""

    def __init__(self, settings: Settings, device: Cpu | Cuda, inbox: Inbox) -> None:
        """Make an idle loader."""
        self._settings = settings
        self._device = device
        self._inbox = inbox
        # One at a time, since transformers sets the default dtype of the whole process
        # while it builds a model. At most one load of each model waits here.
        self._turn = Lock()
        self.warm = False
        """Whether the libraries that weights need are imported."""
        self._log = structlog.get_logger()

    def start(self, model: str, path: str) -> Ticket:
        """Begin a load; its news carry the ticket that is returned.

        Each load has a thread that ends with it. OpenMP keeps helpers for every thread
        that ever computed, and while there are more of them than processors it puts all
        to sleep between any two products: the step loop would lose a third of its speed.
        """
        ticket = Ticket(model, Path(path))
        Thread(target=self._run, args=(ticket,), name="loader", daemon=True).start()
        return ticket

    def warm_up(self) -> None:
        """Begin to import what weights need; loads that come meanwhile wait."""
        Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def _warm_up(self) -> None:
        with self._turn:
            self._import_libraries()

    def _run(self, ticket: Ticket) -> None:
        with self._turn:
            news = self._attempt(ticket)
        if isinstance(news, LoadFailed):
            # Only now: inside the attempt its error still holds what was loaded.
            release_memory()
        self._inbox.put(news)

    def _attempt(self, ticket: Ticket) -> LoadSucceeded | LoadFailed:
        try:
            return LoadSucceeded(ticket, *self._load(ticket))
        except LoadStoppedError:
            return LoadFailed(ticket, "the load was stopped", out_of_memory=False)
        except Exception as error:  # noqa: BLE001  (whatever it is, the front is told)
            self._log.exception("load failed", model=ticket.model)
            message = f"{type(error).__name__}: {error}"[:1000]
            return LoadFailed(ticket, message, _is_out_of_memory(error))

    def _load(self, ticket: Ticket) -> tuple[Engine, int, Vocabulary | None]:
        self._report(ticket, LoadPhase.LOAD_PHASE_READ, 0)
        manifest = Manifest.model_validate_json((ticket.path / MANIFEST_FILE).read_bytes())
        if manifest.scheme.kind == "scripted":
            return self._load_scripted(ticket)
        self._read_through(ticket, manifest)
        return self._load_weights(ticket, manifest)

    def _load_scripted(self, ticket: Ticket) -> tuple[Engine, int, None]:
        config = ScriptedConfig.model_validate_json((ticket.path / "config.json").read_bytes())
        script = config.script
        phases = (
            LoadPhase.LOAD_PHASE_READ,
            LoadPhase.LOAD_PHASE_PLACE,
            LoadPhase.LOAD_PHASE_WARM_UP,
        )
        for phase in phases:
            ticket.stop.wait(script.load_ms / 1e3 / len(phases))
            self._report(ticket, phase, 1)
        if any(fault.kind == "load_error" for fault in script.faults):
            message = "scripted load error"
            raise RuntimeError(message)
        return ScriptedEngine(config, self._settings.max_running), 0, None

    def _load_weights(self, ticket: Ticket, manifest: Manifest) -> tuple[Engine, int, Vocabulary]:
        self._report(ticket, LoadPhase.LOAD_PHASE_PLACE, 0)
        self._import_libraries()
        from lowbit_server.engine.batching import BatchingEngine  # noqa: PLC0415
        from lowbit_server.grammar.matcher import Vocabulary  # noqa: PLC0415
        from lowbit_server.models.loading import load  # noqa: PLC0415

        settings = self._settings
        decoder = load(ticket.path, settings.device, manifest.context_tokens)
        self._report(ticket, LoadPhase.LOAD_PHASE_WARM_UP, 0)
        kv_cache_bytes = settings.kv_cache_bytes or self._device.memory().free // 2
        engine = BatchingEngine(
            decoder, settings.max_running, kv_cache_bytes, self._inbox.interrupt
        )
        self._report(ticket, LoadPhase.LOAD_PHASE_WARM_UP, 1)
        vocabulary = Vocabulary(ticket.path, decoder.spec.vocab_size, manifest.eos_token_ids)
        return engine, decoder.live_bytes, vocabulary

    def _import_libraries(self) -> None:
        """Import what weights need, the first time.

        Not before: a process that plays scripts starts without torch, which takes seconds.
        """
        if self.warm:
            return
        import torch  # noqa: PLC0415

        import lowbit_server.grammar.matcher  # noqa: PLC0415
        import lowbit_server.models.loading  # noqa: F401, PLC0415

        if self._settings.device == "cpu":
            page_out_cuda()
        torch.set_num_threads(self._settings.threads)
        collector.freeze()
        self.warm = True

    def _read_through(self, ticket: Ticket, manifest: Manifest) -> None:
        """Read all files once, so that placing them finds them in the page cache."""
        total, done = max(manifest.disk_bytes, 1), 0
        for entry in manifest.files:
            with (ticket.path / entry.path).open("rb", buffering=0) as file:
                buffer = bytearray(READ_CHUNK_BYTES)
                while count := file.readinto(buffer):
                    done += count
                    self._report(ticket, LoadPhase.LOAD_PHASE_READ, min(done / total, 1))

    def _report(self, ticket: Ticket, phase: int, fraction: float) -> None:
        """Say how far the load is; raises LoadStoppedError when it is to stop."""
        if ticket.stop.is_set():
            raise LoadStoppedError
        self._inbox.put(LoadAdvanced(ticket, phase, fraction))


def _is_out_of_memory(error: Exception) -> bool:
    # By name, as torch may not be there at all; its CPU allocator has no class of its own.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
