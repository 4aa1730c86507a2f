"""Fills the messages of estimates for models of the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from lowbit.v1 import model_pb2, quantization_pb2
from lowbit_server.quant import cost
from lowbit_server.quant.schemes import FloatScheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.pool.worker import Worker
    from lowbit_server.quant.footprint import Headers
    from lowbit_server.quant.schemes import Scheme


def quantization(
    source: Headers, scheme: Scheme, tokens: int, devices: Sequence[str]
) -> quantization_pb2.EstimateQuantizationResponse:
    """Return what a copy in another scheme would take; `tokens` is those that calibrate."""
    copy = source.copied(scheme)
    return quantization_pb2.EstimateQuantizationResponse(
        disk_bytes=copy.disk_bytes,
        devices=[
            quantization_pb2.DeviceEstimate(
                device=device,
                live_bytes=copy.size(device).live_bytes,
                kv_bytes_per_token=copy.shape.kv_bytes_per_token(device),
                peak_memory_bytes=cost.quantize_peak_bytes(
                    source.entries, scheme, tokens, source.hidden
                ),
                duration=_duration(
                    cost.quantize_seconds(
                        source.entries, copy.entries, scheme, tokens, cost.cpu_speed()
                    )
                )
                if device == "cpu"
                else None,
            )
            for device in devices
        ],
    )


def load(
    model: Headers, devices: Sequence[str], workers: Sequence[Worker]
) -> model_pb2.EstimateLoadResponse:
    """Return what a model would take on each device."""
    return model_pb2.EstimateLoadResponse(
        disk_bytes=model.manifest.disk_bytes,
        devices=[
            _load_estimate(model, device, [one for one in workers if one.device == device])
            for device in devices
        ],
    )


def _load_estimate(
    model: Headers, device: str, workers: Sequence[Worker]
) -> model_pb2.LoadEstimate:
    live = model.live_bytes(device)
    stored = model.manifest.disk_bytes
    mapped = isinstance(model.manifest.scheme, FloatScheme) and (
        model.shape.live_dtype(device) == model.shape.dtype
    )
    cold = not any(worker.warm for worker in workers)
    seconds = cost.load_seconds(stored, model.manifest.scheme, cold=cold)
    return model_pb2.LoadEstimate(
        device=device,
        live_bytes=live,
        kv_bytes_per_token=model.shape.kv_bytes_per_token(device),
        peak_memory_bytes=cost.load_peak_bytes(stored, live, mapped=mapped),
        duration=_duration(seconds) if device == "cpu" else None,
        fits=any(worker.free_bytes >= live for worker in workers),
    )


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromMilliseconds(round(seconds * 1000))
    return message
