"""Imports a Hugging Face folder: streams its tensors and copies what belongs to them.

Imports torch: for job processes only.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.jobs.describing import copied_files, write_config
from lowbit_server.quant.casting import FLOAT_TYPES, cast, float_type, type_name
from lowbit_server.quant.foreign import foreign_scheme, stored_parameters
from lowbit_server.quant.foreign_fields import check_fields
from lowbit_server.quant.schemes import FloatScheme
from lowbit_server.store.sealing import disk_full_is_named
from lowbit_server.store.sources import CONFIG_FILE, TOKENIZER_FILE, Source, read_json
from lowbit_server.store.tensors import TensorReader, TensorWriter

if TYPE_CHECKING:
    import torch

    from lowbit_server.jobs.report import Reporter
    from lowbit_server.quant.schemes import FloatType, Scheme


def import_folder(
    source: Source, staging: Path, asked: FloatType | None, reporter: Reporter
) -> tuple[Scheme, int]:
    """Write the model into `staging`, cast when asked; return its scheme and parameters.

    Raises LowbitError: SOURCE_CORRUPT, SOURCE_UNSUPPORTED, INVALID_FIELD, DISK_FULL.
    """
    config = read_json(source.path / CONFIG_FILE)
    scheme: Scheme
    dtype = None
    with TensorReader(source.weights) as reader:
        if "quantization_config" in config:
            quantization = config["quantization_config"]
            scheme = foreign_scheme(quantization, reader.entries)
            check_fields(quantization)
            if asked is not None:
                raise invalid("type", f"the source is quantized ({scheme.name}): leave it out")
            parameters = stored_parameters(reader.entries, quantization)
        else:
            scheme = FloatScheme(type=asked or float_type(reader.entries))
            parameters = sum(entry.elements for entry in reader.entries.values())
            dtype = type_name(scheme.type)
        _stream(reader, staging, FLOAT_TYPES[asked] if asked is not None else None, reporter)
    write_config(staging, config, dtype)
    _copy(source.path, staging)
    if not (staging / TOKENIZER_FILE).exists():
        _make_tokenizer(source.path, staging)
    return scheme, parameters


def _copy(source: Path, staging: Path) -> None:
    with disk_full_is_named(staging):
        for file in copied_files(source):
            shutil.copyfile(file, staging / file.name)


def _stream(
    reader: TensorReader, staging: Path, dtype: torch.dtype | None, reporter: Reporter
) -> None:
    reporter.phase("download", len(reader.entries))
    with TensorWriter(staging, len(reader.entries)) as writer:
        for done, name in enumerate(reader.entries, 1):
            tensor = reader.tensor(name)
            writer.write(name, tensor if dtype is None else cast(name, tensor, dtype))
            reporter.progress(done, writer.bytes)


def _make_tokenizer(source: Path, staging: Path) -> None:
    """Build tokenizer.json from whatever older files the source has."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (seldom needed, 3 s)

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        with tempfile.TemporaryDirectory(dir=staging) as made:
            tokenizer.save_pretrained(made)
            _copy(Path(made), staging)
    except LowbitError:
        raise
    except Exception as error:  # the library raises nearly anything for files it cannot read
        message = f"{source} has no {TOKENIZER_FILE} and none can be made: {error}"
        raise LowbitError(Reason.SOURCE_UNSUPPORTED, message[:500]) from error
    if not (staging / TOKENIZER_FILE).exists():
        message = f"{source} has no {TOKENIZER_FILE} and its tokenizer has no fast form"
        raise LowbitError(Reason.SOURCE_UNSUPPORTED, message)
