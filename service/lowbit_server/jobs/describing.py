"""Makes the manifest of a folder that a job has filled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.manifest import MANIFEST_FILE, FileEntry, Manifest
from lowbit_server.store.sealing import (
    disk_full_is_named,
    file_digest,
    revision_of,
    seal_files,
    write_manifest,
)
from lowbit_server.store.sources import CONFIG_FILE, TOKENIZER_FILE, read_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lowbit_server.jobs.spec import ImportSpec
    from lowbit_server.quant.quality import Quality
    from lowbit_server.quant.schemes import Scheme

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# The only files besides weights and config.json that an artefact takes from its source.
_COPIED_FILES = (
    GENERATION_FILE,
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "chat_template.jinja",
)
_LIBRARIES = ("lowbit-server", "torch", "transformers", "bitsandbytes", "gguf", "safetensors")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def write_import_manifest(
    folder: Path, spec: ImportSpec, scheme: Scheme, *, parameters: int, origin: Origin
) -> None:
    """Seal an imported model, describe it by its own files and write `lowbit.json`.

    Raises LowbitError: SOURCE_CORRUPT when config.json lacks what is needed, DISK_FULL.
    """
    config = text_config(folder)
    architectures = read_json(folder / CONFIG_FILE).get("architectures") or [config["model_type"]]
    files = seal_files(folder)
    manifest = Manifest(
        name=spec.model,
        revision=revision_of(files),
        scheme=scheme,
        architecture=architectures[0],
        parameters=parameters,
        context_tokens=_number(config, *_CONTEXT_KEYS),
        vocab_size=_number(config, "vocab_size"),
        eos_token_ids=eos_token_ids(folder, config),
        files=files,
        source=spec.hub_id or spec.path or "",
        source_revision=origin.revision,
        source_digest=origin.digest,
        source_files=origin.files,
        create_time=datetime.now(UTC),
        libraries=library_versions(),
    )
    write_manifest(folder, manifest)


def write_quantized_manifest(  # noqa: PLR0913 - what a manifest tells
    folder: Path,
    name: str,
    scheme: Scheme,
    parent: Manifest,
    files: tuple[FileEntry, ...],
    quality: Quality | None,
    calibration_digest: str,
) -> None:
    """Describe a sealed model made from another of the store and write `lowbit.json`.

    Raises LowbitError(DISK_FULL).
    """
    changes = {
        "name": name,
        "revision": revision_of(files),
        "scheme": scheme,
        "files": files,
        "source": parent.name,
        "source_revision": "",
        "source_digest": parent.revision,
        "source_files": (),
        "parent": parent.name,
        "ancestors": parent.lineage,
        "calibration_digest": calibration_digest,
        "quality": quality,
        "create_time": datetime.now(UTC),
        "libraries": library_versions(),
    }
    write_manifest(folder, parent.model_copy(update=changes))


def read_manifest(folder: Path, name: str) -> Manifest:
    """Return the manifest of a model's folder; raise LowbitError(MODEL_NOT_FOUND)."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        message = f"no model is named {name}"
        raise LowbitError(Reason.MODEL_NOT_FOUND, message, metadata={"model": name}) from error


def copied_files(source: Path) -> list[Path]:
    """Return the files of a source that an artefact keeps as they are."""
    return [source / name for name in _COPIED_FILES if (source / name).is_file()]


def text_config(folder: Path) -> dict[str, Any]:
    """Return the part of config.json that describes the language model."""
    config = read_json(folder / CONFIG_FILE)
    nested = config.get("text_config")
    return config | nested if isinstance(nested, dict) else config


def write_config(folder: Path, config: dict[str, Any], dtype: str | None = None) -> None:
    """Write config.json, with the type of its weights where one is given.

    Raises LowbitError(DISK_FULL).
    """
    if dtype is not None:
        for part in (config, config.get("text_config")):
            # Older files say torch_dtype; two that differ would be a riddle.
            if isinstance(part, dict) and (part is config or {"dtype", "torch_dtype"} & set(part)):
                part.pop("torch_dtype", None)
                part["dtype"] = dtype
    with disk_full_is_named(folder):
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a text: of the generation config, the config or the tokenizer."""
    generation = folder / GENERATION_FILE
    for values in (read_json(generation) if generation.exists() else {}, config):
        match values.get("eos_token_id"):
            case bool():
                continue
            case int(token):
                return (token,)
            case [*tokens] if tokens and all(type(token) is int for token in tokens):
                return tuple(tokens)
    return _tokenizer_eos(folder)


def _tokenizer_eos(folder: Path) -> tuple[int, ...]:
    path = folder / TOKENIZER_CONFIG_FILE
    token = read_json(path).get("eos_token") if path.exists() else None
    if isinstance(token, dict):  # older configs store the token with its flags
        token = token.get("content")
    added = read_json(folder / TOKENIZER_FILE).get("added_tokens")
    entries = added if isinstance(added, list) else []
    return tuple(
        entry["id"] for entry in entries if token is not None and entry.get("content") == token
    )


@dataclass(frozen=True, slots=True)
class Origin:
    """What a model is imported from."""

    files: tuple[FileEntry, ...]
    revision: str
    """Commit of the hub, if it came from there."""

    @staticmethod
    def of(paths: Iterable[Path], revision: str) -> Origin:
        """Hash the files of a source."""
        files = [
            FileEntry(path=path.name, bytes=path.stat().st_size, sha256=file_digest(path))
            for path in paths
        ]
        return Origin(tuple(sorted(files, key=lambda file: file.path)), revision)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of the files."""
        lines = (f"{file.path}\0{file.sha256}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make the numbers, where installed."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _number(config: dict[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    raise LowbitError(Reason.SOURCE_CORRUPT, f"{CONFIG_FILE} has no {' or '.join(keys)}")
