"""Verbs of QuantizationService."""

# gRPC keeps the deadline, over all tries of a call.
# ruff: noqa: ASYNC109

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.messages import new_request_id
from lowbit.schemes import scheme as make_scheme
from lowbit.v1.quantization_pb2 import (
    Calibration,
    EstimateQuantizationRequest,
    EstimateQuantizationResponse,
    EvaluateRequest,
    Evaluation,
    ListSchemesRequest,
    QualityGate,
    QuantizeRequest,
    Scheme,
    SchemeInfo,
)
from lowbit.v1.quantization_pb2_grpc import QuantizationServiceStub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.v1.job_pb2 import Job

    from .transport import AsyncTransport


class AsyncQuantization:
    """Makes smaller copies of models and measures what they cost in quality."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Use the transport's channel."""
        self._transport = transport
        self._stub = QuantizationServiceStub(transport.channel)

    async def quantize(  # noqa: PLR0913 - options of one request
        self,
        source: str,
        target: str,
        scheme: Scheme | str,
        *,
        device: str = "",
        calibration: Calibration | None = None,
        evaluation: Evaluation | None = None,
        skip_evaluation: bool = False,
        gate: QualityGate | None = None,
        request_id: str = "",
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Job:
        """Start a job that makes a smaller copy of a model.

        Args:
            source: name or alias of the source model.
            target: name of the new model; must be free.
            scheme: a Scheme, or a name such as "int8" or "nf4" (see `lowbit.scheme`).
            device: device that does the work; empty: the first one.
            calibration: text for schemes that use it.
            evaluation: text that the result is measured on; None: the built-in one.
            skip_evaluation: measures nothing.
            gate: limits; the job fails when one is missed.
            request_id: makes the call idempotent; made here when empty.
            validate_only: checks everything and starts nothing; the job has no id.
            timeout: deadline of the call in seconds, not of the job.

        Raises:
            ValueError: for an unknown scheme name.
            SchemeUnavailableError: when the scheme cannot be used on this server.
            LowbitError: when the server refuses otherwise.

        """
        request = QuantizeRequest(
            source=source,
            target=target,
            scheme=_scheme(scheme),
            device=device,
            calibration=calibration,
            evaluation=evaluation,
            skip_evaluation=skip_evaluation,
            gate=gate,
            request_id=request_id or new_request_id(unless=validate_only),
            validate_only=validate_only,
        )
        response = await self._transport.call(
            self._stub.Quantize, request, timeout_s=timeout, repeatable=True
        )
        return response.job

    async def list_schemes(self, *, timeout: float | None = None) -> Sequence[SchemeInfo]:
        """Return all schemes and, per device, whether they can be used and if not why."""
        response = await self._transport.call(
            self._stub.ListSchemes, ListSchemesRequest(), timeout_s=timeout, repeatable=True
        )
        return response.schemes

    async def estimate_quantization(
        self,
        source: str,
        scheme: Scheme | str,
        *,
        calibration: Calibration | None = None,
        timeout: float | None = None,
    ) -> EstimateQuantizationResponse:
        """Return bytes and time before any work, from headers only.

        Args:
            source: name or alias of the source model.
            scheme: a Scheme, or a name such as "int8" or "nf4" (see `lowbit.scheme`).
            calibration: text for schemes that use it; its size decides their time.
            timeout: deadline of the call in seconds.

        Raises:
            ValueError: for an unknown scheme name.
            LowbitError: when the call failed.

        """
        request = EstimateQuantizationRequest(
            source=source, scheme=_scheme(scheme), calibration=calibration
        )
        return await self._transport.call(
            self._stub.EstimateQuantization, request, timeout_s=timeout, repeatable=True
        )

    async def evaluate(  # noqa: PLR0913 - options of one request
        self,
        model: str,
        *,
        against: str = "",
        evaluation: Evaluation | None = None,
        device: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> Job:
        """Start a job that measures a model against another on held-out text.

        `wait_job` returns the job with the report in its field `quality`. That of a model
        against its parent is the model's too.

        Args:
            model: name or alias.
            against: model that it is compared with; empty: its parent.
            evaluation: text that both are measured on; None: the built-in one.
            device: device that does the work; empty: the first one.
            request_id: makes the call idempotent; made here when empty.
            timeout: deadline of the call in seconds, not of the job.

        Raises:
            LowbitError: when the server refuses.

        """
        request = EvaluateRequest(
            model=model,
            against=against,
            evaluation=evaluation,
            device=device,
            request_id=request_id or new_request_id(),
        )
        response = await self._transport.call(
            self._stub.Evaluate, request, timeout_s=timeout, repeatable=True
        )
        return response.job


def _scheme(scheme: Scheme | str) -> Scheme:
    return make_scheme(scheme) if isinstance(scheme, str) else scheme
