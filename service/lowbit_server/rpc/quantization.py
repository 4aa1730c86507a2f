"""QuantizationService: makes smaller copies of models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lowbit.v1 import quantization_pb2 as pb
from lowbit.v1.quantization_pb2_grpc import QuantizationServiceServicer
from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec, QuantizeSpec
from lowbit_server.quant import hub_text, registry
from lowbit_server.rpc import convert
from lowbit_server.store import sources

if TYPE_CHECKING:
    from lowbit_server.config import Config
    from lowbit_server.jobs.manager import JobManager
    from lowbit_server.quant.schemes import Scheme
    from lowbit_server.rpc.context import Context
    from lowbit_server.scheduler import Scheduler
    from lowbit_server.store.catalog import Catalog
    from lowbit_server.store.manifest import Manifest


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
        device = request.device or self._config.devices[0]
        if device not in self._config.devices:
            message = f"no device is named {device!r}; there are: {', '.join(self._config.devices)}"
            raise LowbitError(Reason.DEVICE_NOT_FOUND, message, metadata={"device": device})
        registry.check(scheme, source, device)
        calibration = await self._calibration(
            request.calibration, scheme, source, given=request.HasField("calibration")
        )
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
            calibration=calibration,
            evaluation=evaluation,
            gate=gate,
        )
        job = await self._jobs.submit(spec, request.request_id, validate_only=request.validate_only)
        return pb.QuantizeResponse(job=convert.job(job))

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

    async def _calibration(
        self, message: pb.Calibration, scheme: Scheme, source: Manifest, *, given: bool
    ) -> CalibrationSpec | None:
        """Return what a scheme is calibrated with: by default the built-in text."""
        if not registry.is_calibrated(scheme):
            if given:
                raise invalid("calibration", f"scheme {scheme.name} uses no calibration text")
            return None
        numbers = _given(message, "samples", "sequence_tokens", "seed")
        default = CalibrationSpec.model_fields["sequence_tokens"].default
        tokens = numbers.setdefault("sequence_tokens", min(default, source.context_tokens))
        if tokens > source.context_tokens:
            raise invalid(
                "calibration.sequence_tokens",
                f"the context of {source.name} ends at {source.context_tokens}",
            )
        text = await self._text(message.source, "calibration")
        return CalibrationSpec(**text, **numbers, chat_template=message.chat_template)

    async def _evaluation(self, message: pb.Evaluation) -> EvaluationSpec:
        text = await self._text(message.source, "evaluation")
        return EvaluationSpec(**text, **_given(message, "max_tokens", "window_tokens"))

    async def _text(self, source: pb.TextSource, owner: str) -> dict[str, Any]:
        """Return the fields of a TextSpec."""
        match source.WhichOneof("kind"):
            case "file":
                path = await asyncio.to_thread(
                    sources.locate, source.file.path, self._config.import_roots
                )
                return {"text_path": str(path), "text_field": source.file.field}
            case "inline":
                return {"text_inline": tuple(source.inline.samples)}
            case "dataset":
                hub_text.check_name(f"{owner}.source.dataset", source.dataset)
                return {"dataset": source.dataset}
        return {}


def _given(message: pb.Calibration | pb.Evaluation, *fields: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in fields if message.HasField(name)}  # type: ignore[arg-type]
