"""Imports a model: whatever it came as, the staging folder ends as a Hugging Face folder."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from lowbit_server.errors import invalid
from lowbit_server.jobs.describing import Origin, copied_files, write_import_manifest
from lowbit_server.jobs.hub import download
from lowbit_server.quant.schemes import FloatScheme, ScriptedScheme
from lowbit_server.store.sealing import disk_full_is_named
from lowbit_server.store.sources import CONFIG_FILE, Source, inspect

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.jobs.context import Context
    from lowbit_server.jobs.spec import ImportSpec
    from lowbit_server.quant.schemes import FloatType, Scheme


def import_model(spec: ImportSpec, context: Context) -> None:
    """Fill the staging folder with the model of `spec` and its manifest.

    Raises LowbitError: the reasons of `store.sources.inspect`, INVALID_FIELD, DISK_FULL.
    """
    staging = context.staging
    with disk_full_is_named(staging.parent):
        staging.mkdir(mode=0o700)
    context.reporter.phase("download")
    fetched = staging / ".download"
    source, revision = _source(spec, fetched, context)
    scheme, parameters = _convert(source, spec.type, context)
    origin = Origin.of(_read_files(source), revision)
    shutil.rmtree(fetched, ignore_errors=True)
    context.reporter.phase("save")
    write_import_manifest(staging, spec, scheme, parameters=parameters, origin=origin)


def _source(spec: ImportSpec, fetched: Path, context: Context) -> tuple[Source, str]:
    """Return the source and, for one of the hub, its commit."""
    if spec.hub_id is not None:
        revision = download(spec.hub_id, fetched)
        return inspect(str(fetched), [fetched], scripted=False), revision
    if spec.path is not None:
        return inspect(spec.path, context.roots, scripted=context.scripted), ""
    raise invalid("source", "give a path or a hub id")


def _convert(source: Source, asked: FloatType | None, context: Context) -> tuple[Scheme, int]:
    # Imported where needed: scripted models need no torch, only GGUF files need gguf.
    match source.kind:
        case "scripted":
            with disk_full_is_named(context.staging):
                for file in _read_files(source):
                    shutil.copyfile(file, context.staging / file.name)
            return ScriptedScheme(), 0
        case "gguf":
            from lowbit_server.jobs.import_gguf import import_gguf  # noqa: PLC0415

            kind = asked or "bf16"
            parameters = import_gguf(source.path, context.staging, kind, context.reporter)
            return FloatScheme(type=kind), parameters
        case "folder":
            from lowbit_server.jobs.import_folder import import_folder  # noqa: PLC0415

            return import_folder(source, context.staging, asked, context.reporter)


def _read_files(source: Source) -> list[Path]:
    if source.kind == "gguf":
        return list(source.weights)
    return [source.path / CONFIG_FILE, *source.weights, *copied_files(source.path)]
