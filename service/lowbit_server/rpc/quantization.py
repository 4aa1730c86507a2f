"""QuantizationService: makes smaller copies of models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lowbit.v1 import quantization_pb2 as pb
from lowbit.v1.quantization_pb2_grpc import QuantizationServiceServicer
from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.jobs.spec import EvaluationSpec, QuantizeSpec
from lowbit_server.quant import registry
from lowbit_server.rpc import convert
from lowbit_server.store import sources

if TYPE_CHECKING:
    from lowbit_server.config import Config
    from lowbit_server.jobs.manager import JobManager
    from lowbit_server.rpc.context import Context
    from lowbit_server.scheduler import Scheduler
    from lowbit_server.store.catalog import Catalog


class QuantizationService(QuantizationServiceServicer):
    """Checks what can be checked before work starts, then queues a job."""

    def __init__(
        self, config: Config, catalog: Catalog, jobs: JobManager, scheduler: Scheduler
    ) -> None:
        """Quantize the models of `catalog`."""
        self._config = config
        self._catalog = catalog
        self._jobs = jobs
        self._scheduler = scheduler

    async def Quantize(self, request: pb.QuantizeRequest, context: Context) -> pb.QuantizeResponse:
        """Check everything and queue the job."""
        self._scheduler.check_open()
        source = self._catalog.resolve(request.source)
        scheme = convert.scheme(request.scheme)
        if request.HasField("calibration"):
            raise invalid("calibration", f"scheme {scheme.name} uses no calibration text")
        device = request.device or self._config.devices[0]
        if device not in self._config.devices:
            message = f"no device is named {device!r}; there are: {', '.join(self._config.devices)}"
            raise LowbitError(Reason.DEVICE_NOT_FOUND, message, metadata={"device": device})
        registry.check(scheme, source, device)
        evaluation = None
        if request.HasField("evaluation"):
            evaluation = await self._evaluation(request.evaluation)
        gate = convert.gate(request.gate) if request.HasField("gate") else None
        if gate and gate.needs_quality and evaluation is None:
            raise invalid("gate", "limits of quality need `evaluation`: nothing would be measured")
        spec = QuantizeSpec(
            model=request.target,
            source=source.name,
            scheme=scheme,
            device=device,
            evaluation=evaluation,
            gate=gate,
        )
        job = await self._jobs.submit(spec, request.request_id, validate_only=request.validate_only)
        return pb.QuantizeResponse(job=convert.job(job, self._jobs.position(job)))

    async def ListSchemes(
        self,
        request: pb.ListSchemesRequest,
        context: Context,
    ) -> pb.ListSchemesResponse:
        """Return every scheme with its availability per device."""
        return pb.ListSchemesResponse(
            schemes=[
                pb.SchemeInfo(
                    name=info.name,
                    description=info.description,
                    bits_per_weight=info.bits_per_weight,
                    calibrated=info.calibrated,
                    availability=[
                        pb.SchemeAvailability(
                            device=device,
                            can_quantize=found.can_quantize,
                            can_serve=found.can_serve,
                            reason=found.reason,
                        )
                        for device in self._config.devices
                        for found in [info.availability(device)]
                    ],
                )
                for info in registry.schemes()
            ]
        )

    async def EstimateQuantization(
        self,
        request: pb.EstimateQuantizationRequest,
        context: Context,
    ) -> pb.EstimateQuantizationResponse:
        """Belongs to the quality work's next step."""
        raise convert.not_implemented("EstimateQuantization")

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        """Belongs to the quality work's next step."""
        raise convert.not_implemented("Evaluate")

    async def _evaluation(self, message: pb.Evaluation) -> EvaluationSpec:
        values: dict[str, Any] = {
            name: getattr(message, name)
            for name in ("max_tokens", "window_tokens")
            if message.HasField(name)
        }
        match message.source.WhichOneof("kind"):
            case "file":
                path = await asyncio.to_thread(
                    sources.locate, message.source.file.path, self._config.import_roots
                )
                values |= {"text_path": str(path), "text_field": message.source.file.field}
            case "inline":
                values["text_inline"] = tuple(message.source.inline.samples)
            case "dataset":
                raise convert.not_implemented("evaluation.source.dataset")
        return EvaluationSpec(**values)
