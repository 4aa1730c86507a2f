"""Quantizes a model of the store: streams it block by block into the staging folder."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import torch

from lowbit_server.jobs.describing import read_manifest, write_config, write_quantized_manifest
from lowbit_server.jobs.evaluating import Subject, cut_text, measure
from lowbit_server.jobs.fingerprint import fingerprint
from lowbit_server.quant import gate, gptqmodel_provider, registry
from lowbit_server.quant.calibration import draw
from lowbit_server.quant.casting import FLOAT_TYPES, cast, type_name
from lowbit_server.quant.foreign import foreign_scheme
from lowbit_server.quant.layout import blocks, linear_layers
from lowbit_server.quant.methods import method
from lowbit_server.quant.schemes import AwqScheme, FloatScheme, GptqScheme
from lowbit_server.quant.text import check_apart, evaluation_text
from lowbit_server.store.checkpoint import Checkpoint
from lowbit_server.store.sealing import disk_full_is_named, seal_files
from lowbit_server.store.sources import CONFIG_FILE, INDEX_FILE, read_json, shards
from lowbit_server.store.tensors import TensorReader, TensorWriter

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.jobs.context import Context
    from lowbit_server.jobs.spec import QuantizeSpec
    from lowbit_server.quant.calibration import Samples
    from lowbit_server.quant.method import Method
    from lowbit_server.store.manifest import Manifest

# A 4-bit layer is stored as six tensors, weight and scales.
_TENSORS_PER_LINEAR = 6


def quantize_model(spec: QuantizeSpec, context: Context) -> None:
    """Fill the staging folder with a copy of a model in another scheme and its manifest.

    Raises LowbitError: MODEL_NOT_FOUND, SCHEME_UNAVAILABLE, INVALID_FIELD, DISK_FULL,
    CHECKPOINT_MISMATCH, QUALITY_GATE_FAILED, ...
    """
    source = context.models / spec.source
    parent = read_manifest(source, spec.source)
    registry.check(spec.scheme, parent, spec.device, gptqmodel=spec.provider == "gptqmodel")
    assert isinstance(parent.scheme, FloatScheme)  # noqa: S101  (just checked)
    staging = context.staging
    with disk_full_is_named(staging.parent):
        staging.mkdir(mode=0o700)
    held_out = evaluation_text(spec.evaluation) if spec.evaluation else ""
    samples = None
    if spec.calibration is not None:
        context.reporter.phase("calibrate")
        samples = draw(spec.calibration, source, parent.context_tokens)
        check_apart(samples.text, held_out)
    # What the result is stored in where it is not quantized.
    kept = spec.scheme if isinstance(spec.scheme, FloatScheme) else parent.scheme
    digest = samples.digest if samples else ""
    quantization: dict[str, Any] | None
    if spec.provider == "gptqmodel":
        assert samples is not None  # noqa: S101  (its schemes are calibrated)
        quantization = _with_gptqmodel(spec, source, samples, context)
    else:
        chosen = method(spec.scheme, spec.device, source, samples)
        depends_on = fingerprint(spec, parent, digest)
        checkpoint = Checkpoint(context.checkpoint, depends_on, threads=torch.get_num_threads())
        torch.set_num_threads(checkpoint.threads)
        _stream(source, chosen, kept, checkpoint, context)
        quantization = chosen.quantization_config()
    _describe_weights(source, staging, quantization, kept)
    _copy_rest(source, staging, parent)
    files = seal_files(staging)
    quality = None
    if spec.evaluation is not None:
        made = Subject(staging, parent.model_copy(update={"files": files}))
        windows = cut_text(held_out, source, spec.evaluation)
        quality = measure(made, Subject(source, parent), windows, spec.device, context)
    if spec.gate is not None and not spec.gate.keep_artifact:
        gate.check(spec.gate, quality, sum(file.bytes for file in files))
    write_quantized_manifest(staging, spec, parent, files, quality, digest)


def _stream(
    source: Path, chosen: Method, kept: FloatScheme, checkpoint: Checkpoint, context: Context
) -> None:
    """Convert the blocks that are not in the checkpoint yet, then write all from there.

    So the result never depends on where the job was interrupted.
    """
    with TensorReader(shards(source)) as reader:
        context.reporter.phase("quantize")
        linears = []
        if chosen.quantization_config() is not None:
            linears = linear_layers(source, reader.entries)
        chosen.check(linears)
        parts = blocks(reader.entries, linears)

        def read(name: str) -> torch.Tensor:
            return cast(name, reader.tensor(name), FLOAT_TYPES[kept.type])

        if len(checkpoint):
            chosen.restore(checkpoint.state())
        context.reporter.phase("quantize", len(parts), len(checkpoint), checkpoint.bytes)
        for block in parts[len(checkpoint) :]:
            expected = _stored_tensors(len(block.tensors), len(block.linears))
            checkpoint.commit(chosen.convert(block, read), chosen.state, expected)
            context.reporter.progress(len(checkpoint), checkpoint.bytes)
        expected = _stored_tensors(len(reader.entries), len(linears))
    context.reporter.phase("save", len(parts))
    with TensorWriter(context.staging, expected) as writer:
        for done in range(len(parts)):
            for name, tensor in checkpoint.block(done):
                writer.write(name, tensor)
            context.reporter.progress(done + 1, writer.bytes)


def _with_gptqmodel(
    spec: QuantizeSpec, source: Path, samples: Samples, context: Context
) -> dict[str, Any]:
    """Fill the staging folder with what gptqmodel saves; return what it says about it."""
    assert isinstance(spec.scheme, GptqScheme | AwqScheme)  # noqa: S101  (the front chose)
    context.reporter.phase("quantize", read_json(source / CONFIG_FILE)["num_hidden_layers"])
    # Inside the staging folder, so that it goes with it when the job is killed.
    made = context.staging / "gptqmodel"
    gptqmodel_provider.quantize(
        spec.scheme, source, samples.ids, made, lambda done: context.reporter.progress(done, 0)
    )
    quantization: dict[str, Any] = read_json(made / CONFIG_FILE)["quantization_config"]
    with TensorReader(shards(made)) as reader:
        foreign_scheme(quantization, reader.entries)  # raises for what cannot be served
        context.reporter.phase("save", len(reader.entries))
        with TensorWriter(context.staging, len(reader.entries)) as writer:
            for done, name in enumerate(reader.entries, 1):
                writer.write(name, reader.tensor(name))
                context.reporter.progress(done, writer.bytes)
    shutil.rmtree(made)
    return quantization


def _stored_tensors(tensors: int, linears: int) -> int:
    return tensors + _TENSORS_PER_LINEAR * linears


def _describe_weights(
    source: Path, staging: Path, quantization: dict[str, Any] | None, kept: FloatScheme
) -> None:
    config = read_json(source / CONFIG_FILE)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_config(staging, config, type_name(kept.type))


def _copy_rest(source: Path, staging: Path, parent: Manifest) -> None:
    with disk_full_is_named(staging):
        for entry in parent.files:
            if not entry.path.endswith(".safetensors") and entry.path not in {
                CONFIG_FILE,
                INDEX_FILE,
            }:
                shutil.copyfile(source / entry.path, staging / entry.path)
