"""Estimates for models of the store: reads their headers, asks `quant`, fills the messages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration

from lowbit.v1 import model_pb2, quantization_pb2
from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.quant import cost, estimate
from lowbit_server.quant.schemes import FloatScheme, ScriptedScheme
from lowbit_server.store.sources import CONFIG_FILE, INDEX_FILE, read_headers, read_json, shards

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lowbit_server.pool.worker import Worker
    from lowbit_server.quant.schemes import Scheme
    from lowbit_server.store.headers import TensorEntry
    from lowbit_server.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Headers:
    """What is known of a model without its weights."""

    manifest: Manifest
    entries: Mapping[str, TensorEntry]
    shape: estimate.Shape
    hidden: int
    """Width of the activations between layers."""

    @property
    def other_bytes(self) -> int:
        """Bytes of the files that hold no weights."""
        return sum(
            file.bytes
            for file in self.manifest.files
            if not file.path.endswith(".safetensors") and file.path != INDEX_FILE
        )

    def live_bytes(self, device: str) -> int:
        """Return what the model takes once live."""
        return estimate.live_bytes(self.entries, self.manifest.scheme, self.shape, device)


def read(manifest: Manifest, folder: Path) -> Headers:
    """Read config.json and the headers of a model's weights.

    Raises LowbitError: INVALID_FIELD for a scripted model, ARTIFACT_CORRUPT.
    """
    if isinstance(manifest.scheme, ScriptedScheme):
        raise invalid("model", f"{manifest.name} is a scripted test model without weights")
    try:
        config = read_json(folder / CONFIG_FILE)
        found = read_headers(shards(folder)).values()
        entries = {name: entry for header in found for name, entry in header.items()}
        merged: dict[str, Any] = {**config, **(config.get("text_config") or {})}
        return Headers(manifest, entries, estimate.Shape.of(merged, entries), merged["hidden_size"])
    except (LowbitError, KeyError, TypeError, OSError) as error:
        message = f"the files of {manifest.name} do not say what it takes: {error}"
        raise LowbitError(Reason.ARTIFACT_CORRUPT, message) from error


def quantization(
    source: Headers, scheme: Scheme, tokens: int, devices: Sequence[str]
) -> quantization_pb2.EstimateQuantizationResponse:
    """Return what a copy in another scheme would take; `tokens` is those that calibrate."""
    result = estimate.quantized(source.entries, scheme)
    kept = source.shape
    shape = kept.of_type(scheme.type) if isinstance(scheme, FloatScheme) else kept
    return quantization_pb2.EstimateQuantizationResponse(
        disk_bytes=estimate.disk_bytes(source.entries, result, scheme) + source.other_bytes,
        devices=[
            quantization_pb2.DeviceEstimate(
                device=device,
                live_bytes=estimate.live_bytes(result, scheme, shape, device),
                kv_bytes_per_token=shape.kv_bytes_per_token(device),
                peak_memory_bytes=cost.quantize_peak_bytes(
                    source.entries, scheme, tokens, source.hidden
                ),
                duration=_duration(
                    cost.quantize_seconds(source.entries, result, scheme, tokens, cost.cpu_speed())
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
    seconds = cost.load_seconds(stored, cold=not any(worker.replicas for worker in workers))
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
