"""Fetches a model's files from the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from pathlib import Path

_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]


def download(hub_id: str, folder: Path) -> str:
    """Download "org/name" or "org/name@revision" into a folder and return its commit.

    Raises LowbitError(SOURCE_NOT_FOUND) when there is no such model or no way to the hub.
    """
    # Only hub imports pay for it.
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415

    repository, _, revision = hub_id.partition("@")
    try:
        # A branch may move while its files are fetched; a commit does not.
        commit = str(HfApi().model_info(repository, revision=revision or None).sha)
        snapshot_download(
            repository,
            revision=commit,
            local_dir=folder,
            # Weights of sub-folders belong to other formats and are not read.
            allow_patterns=_PATTERNS,
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # HTTP, connection, naming and cache errors share no root
        message = f"{hub_id} cannot be fetched from the hub: {type(error).__name__}: {error}"
        raise LowbitError(Reason.SOURCE_NOT_FOUND, message[:500]) from error
    return commit
