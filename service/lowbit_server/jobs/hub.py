"""Fetches a model's files from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lowbit_server.errors import LowbitError, Reason

_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]


def download(hub_id: str, folder: Path) -> Path:
    """Download "org/name" or "org/name@revision" into a folder and return it.

    Raises LowbitError(SOURCE_NOT_FOUND) when there is no such model or no way to the hub.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (only hub imports pay for it)

    repository, _, revision = hub_id.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                local_dir=folder,
                # Weights of sub-folders belong to other formats and are not read.
                allow_patterns=_PATTERNS,
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # HTTP, connection, naming and cache errors share no root
        message = f"{hub_id} cannot be fetched from the hub: {type(error).__name__}: {error}"
        raise LowbitError(Reason.SOURCE_NOT_FOUND, message[:500]) from error
