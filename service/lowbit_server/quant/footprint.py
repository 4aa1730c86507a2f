"""What is known of a model of the store without its weights, and what copies of it would take.

Imports no torch: the front asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.quant import estimate
from lowbit_server.quant.schemes import FloatScheme, ScriptedScheme
from lowbit_server.store.sources import CONFIG_FILE, INDEX_FILE, read_headers, read_json, shards

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lowbit_server.quant.schemes import Scheme
    from lowbit_server.store.headers import TensorEntry
    from lowbit_server.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Size:
    """What a copy takes, bytes."""

    live_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True)
class Headers:
    """config.json, headers of the weights, and the manifest."""

    manifest: Manifest
    entries: Mapping[str, TensorEntry]
    shape: estimate.Shape
    hidden: int
    """Width of the activations between layers."""

    def live_bytes(self, device: str) -> int:
        """Return what the model takes once live."""
        return estimate.live_bytes(self.entries, self.manifest.scheme, self.shape, device)

    def copied(self, scheme: Scheme) -> Copied:
        """Return what a copy in another scheme is; raises INVALID_FIELD as `quantized` does."""
        shape = self.shape.of_type(scheme.type) if isinstance(scheme, FloatScheme) else self.shape
        entries = estimate.quantized(self.entries, scheme)
        others = sum(
            file.bytes
            for file in self.manifest.files
            if not file.path.endswith(".safetensors") and file.path != INDEX_FILE
        )
        disk_bytes = estimate.disk_bytes(self.entries, entries, scheme) + others
        return Copied(scheme, entries, shape, disk_bytes)


@dataclass(frozen=True, slots=True)
class Copied:
    """A copy that nobody has made yet."""

    scheme: Scheme
    entries: Mapping[str, TensorEntry]
    shape: estimate.Shape
    disk_bytes: int

    def size(self, device: str) -> Size:
        """Return what it takes on disk, and live on a device."""
        live_bytes = estimate.live_bytes(self.entries, self.scheme, self.shape, device)
        return Size(live_bytes, self.disk_bytes)


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
