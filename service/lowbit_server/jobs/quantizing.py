"""Quantizes a model of the store: streams it block by block into the staging folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lowbit_server.jobs.describing import read_manifest, write_config, write_quantized_manifest
from lowbit_server.jobs.evaluating import Subject, cut_text, measure
from lowbit_server.jobs.fingerprint import fingerprint
from lowbit_server.quant import gate, gptqmodel_provider, registry
from lowbit_server.quant.calibration import draw
from lowbit_server.quant.casting import FLOAT_TYPES, cast, type_name
from lowbit_server.quant.foreign import foreign_scheme
from lowbit_server.quant.gptq import GptqMethod
from lowbit_server.quant.layout import blocks, linear_layers
from lowbit_server.quant.methods import method
from lowbit_server.quant.overlap import sketch
from lowbit_server.quant.schemes import AutoScheme, AwqScheme, FloatScheme, GptqScheme
from lowbit_server.quant.shapes import check_shape
from lowbit_server.quant.text import check_apart, evaluation_text
from lowbit_server.store.checkpoint import Checkpoint
from lowbit_server.store.sealing import disk_full_is_named, seal_files
from lowbit_server.store.sources import CALIBRATION_FILE, CONFIG_FILE, INDEX_FILE, read_json, shards
from lowbit_server.store.tensors import TensorReader, TensorWriter

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.jobs.context import Context
    from lowbit_server.jobs.spec import QuantizeSpec
    from lowbit_server.quant.calibration import Samples
    from lowbit_server.quant.evaluation import Windows
    from lowbit_server.quant.method import Method
    from lowbit_server.quant.quality import Quality
    from lowbit_server.quant.schemes import Scheme
    from lowbit_server.store.manifest import FileEntry, Manifest

# A 4-bit layer is stored as six tensors, weight and scales.
_TENSORS_PER_LINEAR = 6


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a job reads, whatever scheme it makes."""

    source: Path
    """Folder of the model."""
    parent: Manifest
    samples: Samples | None
    """What calibrated methods see."""
    windows: Windows | None
    """What the result is measured on."""


@dataclass(frozen=True, slots=True)
class Made:
    """A copy in the staging folder, sealed, without a manifest."""

    files: tuple[FileEntry, ...]
    calibration_digest: str
    """Empty for a scheme that uses no calibration text."""
    losses: tuple[float, ...] = ()
    """What GPTQ lost in each decoder layer; empty for other methods."""

    @property
    def disk_bytes(self) -> int:
        """Size on disk."""
        return sum(file.bytes for file in self.files)


def quantize_model(spec: QuantizeSpec, context: Context) -> None:
    """Fill the staging folder with a copy of a model in another scheme and its manifest.

    Raises LowbitError: MODEL_NOT_FOUND, SCHEME_UNAVAILABLE, INVALID_FIELD, DISK_FULL,
    CHECKPOINT_MISMATCH, QUALITY_GATE_FAILED, ...
    """
    assert not isinstance(spec.scheme, AutoScheme)  # noqa: S101  (see `jobs.auto`)
    inputs = gather(spec, context)
    made = make(spec.scheme, spec, inputs, context)
    quality = measured(made, spec, inputs, context)
    if spec.gate is not None and not spec.gate.keep_artifact:
        gate.check(spec.gate, quality, made.disk_bytes)
    describe(made, spec.scheme, spec, inputs, quality, context)


def gather(spec: QuantizeSpec, context: Context) -> Inputs:
    """Read the source's manifest and the texts, and check that these are apart.

    Raises LowbitError: MODEL_NOT_FOUND, INVALID_FIELD, SOURCE_NOT_FOUND.
    """
    source = context.models / spec.source
    parent = read_manifest(source, spec.source)
    registry.check_source(parent)
    held_out = evaluation_text(spec.evaluation) if spec.evaluation else ""
    samples = windows = None
    if spec.calibration is not None:
        context.reporter.phase("calibrate")
        samples = draw(spec.calibration, source, parent.context_tokens)
        check_apart(samples.text, held_out)
    if spec.evaluation is not None:
        windows = cut_text(held_out, source, spec.evaluation)
    return Inputs(source, parent, samples, windows)


def make(scheme: Scheme, spec: QuantizeSpec, inputs: Inputs, context: Context) -> Made:
    """Fill the staging folder with a copy in a scheme.

    Raises LowbitError: SCHEME_UNAVAILABLE, INVALID_FIELD, DISK_FULL, CHECKPOINT_MISMATCH, ...
    """
    source, parent, samples = inputs.source, inputs.parent, inputs.samples
    staging = context.staging
    registry.check(scheme, parent, spec.device, gptqmodel=spec.provider == "gptqmodel")
    assert isinstance(parent.scheme, FloatScheme)  # noqa: S101  (just checked)
    with disk_full_is_named(staging.parent):
        staging.mkdir(mode=0o700)
    # What the result is stored in where it is not quantized.
    kept = scheme if isinstance(scheme, FloatScheme) else parent.scheme
    digest = samples.digest if samples else ""
    losses: tuple[float, ...] = ()
    quantization: dict[str, Any] | None
    if spec.provider == "gptqmodel":
        assert samples is not None  # noqa: S101  (its schemes are calibrated)
        quantization = _with_gptqmodel(scheme, source, samples, context)
    else:
        chosen = method(scheme, spec.device, source, samples)
        depends_on = fingerprint(scheme, spec.device, parent, digest)
        checkpoint = Checkpoint(context.checkpoint, depends_on, threads=torch.get_num_threads())
        torch.set_num_threads(checkpoint.threads)
        _stream(scheme, source, chosen, kept, checkpoint, context)
        quantization = chosen.quantization_config()
        if isinstance(chosen, GptqMethod):
            losses = chosen.losses
    _describe_weights(source, staging, quantization, kept)
    _copy_rest(source, staging, parent)
    if samples is not None:
        with disk_full_is_named(staging):
            (staging / CALIBRATION_FILE).write_text(json.dumps(sketch(samples.text)))
    return Made(seal_files(staging), digest, losses)


def measured(made: Made, spec: QuantizeSpec, inputs: Inputs, context: Context) -> Quality | None:
    """Measure what is in the staging folder, unless that is switched off.

    Raises LowbitError as `measure` does.
    """
    if inputs.windows is None:
        return None
    own = Subject(context.staging, inputs.parent.model_copy(update={"files": made.files}))
    base = Subject(inputs.source, inputs.parent)
    return measure(own, base, inputs.windows, spec.device, context)


def describe(  # noqa: PLR0913 - what a manifest tells
    made: Made,
    scheme: Scheme,
    spec: QuantizeSpec,
    inputs: Inputs,
    quality: Quality | None,
    context: Context,
) -> None:
    """Write the manifest of what is in the staging folder; raises LowbitError(DISK_FULL)."""
    write_quantized_manifest(
        context.staging,
        spec.model,
        scheme,
        inputs.parent,
        made.files,
        quality,
        made.calibration_digest,
    )


def _stream(  # noqa: PLR0913 - what a result is made of
    scheme: Scheme,
    source: Path,
    chosen: Method,
    kept: FloatScheme,
    checkpoint: Checkpoint,
    context: Context,
) -> None:
    """Convert the blocks that are not in the checkpoint yet, then write all from there.

    So the result never depends on where the job was interrupted.
    """
    with TensorReader(shards(source)) as reader:
        context.reporter.phase("quantize")
        linears = []
        if chosen.quantization_config() is not None:
            linears = linear_layers(source, reader.entries)
            for linear in linears:
                check_shape(scheme, linear.name, linear.out_features, linear.in_features)
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
    scheme: Scheme, source: Path, samples: Samples, context: Context
) -> dict[str, Any]:
    """Fill the staging folder with what gptqmodel saves; return what it says about it."""
    assert isinstance(scheme, GptqScheme | AwqScheme)  # noqa: S101  (the front chose)
    context.reporter.phase("quantize", read_json(source / CONFIG_FILE)["num_hidden_layers"])
    # Inside the staging folder, so that it goes with it when the job is killed.
    made = context.staging / "gptqmodel"
    gptqmodel_provider.quantize(
        scheme, source, samples.ids, made, lambda done: context.reporter.progress(done, 0)
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
