"""The client: one connection and the verbs of all services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from .generation import AsyncGeneration
from .jobs import AsyncJobs
from .models import AsyncModels
from .quantization import AsyncQuantization
from .runtime import AsyncRuntime
from .transport import AsyncTransport

if TYPE_CHECKING:
    from lowbit.options import ClientOptions


class AsyncClient:
    """A connection to one Lowbit server.

    Text: generate, tokenize, detokenize, score.
    Models: import_model, models, get_model, delete_model, verify_model, estimate_load,
    set_alias, load, unload, watch_model.
    Quantization: quantize, list_schemes, estimate_quantization, evaluate.
    Jobs: get_job, jobs, watch_job, wait_job, cancel_job, resume_job, delete_job.
    Runtime: devices, info, watch_runtime.

    Every verb raises LowbitError, or a class derived from it, when the call failed.
    """

    def __init__(self, address: str | None = None, options: ClientOptions | None = None) -> None:
        """Make a client; it connects with its first call.

        Args:
            address: HOST:PORT; None takes LOWBIT_ADDRESS, or else 127.0.0.1:50151.
            options: timeouts, limits and retries.

        """
        self._transport = transport = AsyncTransport(address, options)

        generation = AsyncGeneration(transport)
        self.generate = generation.generate
        self.tokenize = generation.tokenize
        self.detokenize = generation.detokenize
        self.score = generation.score

        models = AsyncModels(transport)
        self.import_model = models.import_model
        self.models = models.models
        self.get_model = models.get_model
        self.delete_model = models.delete_model
        self.verify_model = models.verify_model
        self.estimate_load = models.estimate_load
        self.set_alias = models.set_alias
        self.load = models.load
        self.unload = models.unload
        self.watch_model = models.watch_model

        quantization = AsyncQuantization(transport)
        self.quantize = quantization.quantize
        self.list_schemes = quantization.list_schemes
        self.estimate_quantization = quantization.estimate_quantization
        self.evaluate = quantization.evaluate

        jobs = AsyncJobs(transport)
        self.get_job = jobs.get_job
        self.jobs = jobs.jobs
        self.watch_job = jobs.watch_job
        self.wait_job = jobs.wait_job
        self.cancel_job = jobs.cancel_job
        self.resume_job = jobs.resume_job
        self.delete_job = jobs.delete_job

        runtime = AsyncRuntime(transport)
        self.devices = runtime.devices
        self.info = runtime.info
        self.watch_runtime = runtime.watch_runtime

    @property
    def address(self) -> str:
        """HOST:PORT of the server."""
        return self._transport.address

    async def close(self) -> None:
        """Close the connection; streams that still run are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the client."""
        await self.close()
