"""QuantizationService: makes smaller copies of models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from lowbit.v1 import quantization_pb2 as pb
from lowbit.v1.quantization_pb2_grpc import QuantizationServiceServicer
from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.jobs.spec import CalibrationSpec, EvaluateSpec, EvaluationSpec, QuantizeSpec
from lowbit_server.quant import footprint, hub_text, ladder, registry
from lowbit_server.quant.schemes import AutoScheme, GptqScheme, ScriptedScheme
from lowbit_server.rpc import convert, estimates, schemes
from lowbit_server.store import sources
from lowbit_server.tokenizer import same_vocabulary

if TYPE_CHECKING:
    from lowbit_server.config import Config
    from lowbit_server.jobs.manager import JobManager
    from lowbit_server.quant.schemes import RequestedScheme, Scheme
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
        self._gptqmodel = config.gptqmodel_python is not None

    async def Quantize(self, request: pb.QuantizeRequest, context: Context) -> pb.QuantizeResponse:
        """Check everything and queue the job."""
        self._scheduler.check_open()
        source = self._catalog.resolve(request.source)
        scheme = schemes.requested(request.scheme)
        device = self._device(request.device)
        gate = schemes.gate(request.gate) if request.HasField("gate") else None
        if isinstance(scheme, AutoScheme):
            await self._check_auto(request, scheme, source, device)
            calibrated = registry.follows(source)
        else:
            registry.check(scheme, source, device, gptqmodel=self._gptqmodel)
            calibrated = registry.is_calibrated(scheme)
        calibration = await self._calibration(request, source, scheme, calibrated=calibrated)
        if request.skip_evaluation:
            for field, given in (
                ("evaluation", request.HasField("evaluation")),
                ("gate", gate is not None and gate.needs_quality),
            ):
                if given:
                    raise invalid(field, "cannot go with `skip_evaluation`, which measures nothing")
            evaluation = None
        else:
            evaluation = await self._evaluation(request.evaluation, source.context_tokens)
        if not isinstance(scheme, AutoScheme):
            await self._check_layers(scheme, source)
        spec = QuantizeSpec(
            model=request.target,
            source=source.name,
            scheme=scheme,
            device=device,
            provider="own" if isinstance(scheme, AutoScheme) else registry.provider(scheme, source),
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
                        for found in [info.availability(device, gptqmodel=self._gptqmodel)]
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
        """Say what a copy would take, from the source's headers; nothing is started."""
        source = self._catalog.resolve(request.source)
        scheme = schemes.requested(request.scheme)
        if isinstance(scheme, AutoScheme):
            raise invalid("scheme", "auto tries several schemes: estimate those of interest")
        registry.check_source(source)
        calibrated = registry.is_calibrated(scheme)
        calibration = await self._calibration(request, source, scheme, calibrated=calibrated)
        tokens = calibration.samples * calibration.sequence_tokens if calibration else 0
        folder = self._catalog.path(source)

        def answer() -> pb.EstimateQuantizationResponse:
            headers = footprint.read(source, folder)
            return estimates.quantization(headers, scheme, tokens, self._config.devices)

        return await asyncio.to_thread(answer)

    async def Evaluate(self, request: pb.EvaluateRequest, context: Context) -> pb.EvaluateResponse:
        """Check that the two can be compared and queue the job."""
        self._scheduler.check_open()
        model = self._catalog.resolve(request.model)
        against = self._against(model, request.against)
        await self._check_comparable(model, against)
        context_tokens = min(model.context_tokens, against.context_tokens)
        spec = EvaluateSpec(
            model=model.name,
            against=against.name,
            device=self._device(request.device),
            evaluation=await self._evaluation(request.evaluation, context_tokens),
        )
        job = await self._jobs.submit(spec, request.request_id, validate_only=False)
        return pb.EvaluateResponse(job=convert.job(job))

    async def _check_layers(self, scheme: Scheme, source: Manifest) -> None:
        """Refuse layers that a scheme cannot take, and bits for layers that there are not.

        Of architectures that we know the headers tell which matrices are linear layers; of
        others the job finds out before it quantizes.
        """
        if registry.follows(source) or (isinstance(scheme, GptqScheme) and scheme.layers):
            folder = self._catalog.path(source)
            await asyncio.to_thread(lambda: footprint.read(source, folder).copied(scheme))

    async def _check_auto(
        self, request: pb.QuantizeRequest, scheme: AutoScheme, source: Manifest, device: str
    ) -> None:
        """Check that the scheme can be chosen by what is measured, and that one would fit."""
        registry.check_source(source)
        if request.skip_evaluation:
            raise invalid("skip_evaluation", "cannot go with scheme auto, which has to measure")
        if request.gate.keep_artifact:
            reason = "cannot go with scheme auto: quantize with the scheme of a trial to keep it"
            raise invalid("gate.keep_artifact", reason)
        disk_bytes = request.gate.max_bytes if request.gate.HasField("max_bytes") else None
        limits = ladder.Limits(scheme.max_live_bytes, disk_bytes)
        folder = self._catalog.path(source)

        def check() -> None:
            headers = footprint.read(source, folder)

            def size(one: Scheme) -> footprint.Size:
                registry.check(one, source, device, gptqmodel=False)
                return headers.copied(one).size(device)

            calibrated = registry.follows(source)
            found = ladder.candidates(size, limits, calibrated=calibrated, losses={})
            ladder.check(found, limits)

        await asyncio.to_thread(check)

    async def _calibration(
        self,
        request: pb.QuantizeRequest | pb.EstimateQuantizationRequest,
        source: Manifest,
        scheme: RequestedScheme,
        *,
        calibrated: bool,
    ) -> CalibrationSpec | None:
        """Return what a scheme is calibrated with: by default the built-in text."""
        message = request.calibration
        if not calibrated:
            if request.HasField("calibration"):
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

    def _device(self, name: str) -> str:
        devices = self._config.devices
        if name and name not in devices:
            message = f"no device is named {name!r}; there are: {', '.join(devices)}"
            raise LowbitError(Reason.DEVICE_NOT_FOUND, message, metadata={"device": name})
        return name or devices[0]

    def _against(self, model: Manifest, name: str) -> Manifest:
        """Return the model of a name; without one, the parent as it was then."""
        if name:
            return self._catalog.resolve(name)
        if not model.parent:
            raise invalid("against", f"{model.name} has no parent: say what to compare it with")
        parent = self._catalog.resolve(model.parent)
        if parent.revision != model.source_digest:
            message = f"{parent.name} is not the model that {model.name} was made from any more"
            raise invalid("against", f"{message}: say what to compare it with")
        return parent

    async def _check_comparable(self, model: Manifest, against: Manifest) -> None:
        for field, one in (("model", model), ("against", against)):
            if isinstance(one.scheme, ScriptedScheme):
                raise invalid(field, f"{one.name} is a scripted test model without weights")
        same = model.vocab_size == against.vocab_size and await asyncio.to_thread(
            same_vocabulary, self._catalog.path(model), self._catalog.path(against)
        )
        if not same:
            message = f"{against.name} and {model.name} have different vocabularies"
            raise invalid("against", message)

    async def _evaluation(self, message: pb.Evaluation, context_tokens: int) -> EvaluationSpec:
        text = await self._text(message.source, "evaluation")
        spec = EvaluationSpec(**text, **_given(message, "max_tokens", "window_tokens"))
        if spec.window_tokens <= context_tokens:
            return spec
        if message.HasField("window_tokens"):
            reason = f"is more than the context of {context_tokens} tokens"
            raise invalid("evaluation.window_tokens", reason)
        return spec.model_copy(update={"window_tokens": context_tokens})

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
