"""Measures a model against another, both run as a worker runs them."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.hardware import processor_name
from lowbit_server.jobs.base_cache import BaseCache, Entry, Figures, key_of
from lowbit_server.jobs.describing import library_versions, read_manifest
from lowbit_server.jobs.report import peak_memory_bytes
from lowbit_server.jobs.spec import Measured
from lowbit_server.models import measure as speed
from lowbit_server.models.decoder import CHUNK_TOKENS
from lowbit_server.models.loading import load
from lowbit_server.models.transformers import UnsupportedModelError
from lowbit_server.quant.evaluation import Divergence, cut
from lowbit_server.quant.quality import Quality
from lowbit_server.quant.text import check_unseen, evaluation_text
from lowbit_server.store.sources import CALIBRATION_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from lowbit_server.jobs.context import Context
    from lowbit_server.jobs.spec import EvaluateSpec, EvaluationSpec
    from lowbit_server.quant.evaluation import Windows
    from lowbit_server.store.manifest import Manifest

# Counts changes of how models are run that change what they compute.
_DECODER = 3
_MAX_LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """A model's folder, which need not be published yet, and its manifest."""

    folder: Path
    manifest: Manifest


def evaluate_model(spec: EvaluateSpec, context: Context) -> Measured:
    """Measure a model of the store against another.

    Raises LowbitError: MODEL_NOT_FOUND, INVALID_FIELD for a text that one of them was
    calibrated on, those of `evaluation_text` and of `measure`.
    """
    own, base = (
        Subject(folder, read_manifest(folder, folder.name))
        for folder in (context.models / spec.model, context.models / spec.against)
    )
    text = evaluation_text(spec.evaluation)
    for subject in (own, base):
        if (file := subject.folder / CALIBRATION_FILE).exists():
            check_unseen(text, json.loads(file.read_bytes()))
    windows = cut_text(text, base.folder, spec.evaluation)
    return Measured(quality=measure(own, base, windows, spec.device, context))


def measure(
    own: Subject, base: Subject, windows: Windows, device: str, context: Context
) -> Quality:
    """Return quality, size and speed of a model beside those of another.

    What the base says of the text comes from the cache, or is computed and put there
    before the model is loaded, so that only one of them is in memory. Where the cache may
    not take it, both are, and nothing is stored. Logits are held a chunk at a time.

    Raises LowbitError: SOURCE_UNSUPPORTED for a model that a worker cannot run,
    INVALID_FIELD for windows that pass the context, DISK_FULL.
    """
    cached = _cached(base, windows, device, context)
    context.reporter.phase("evaluate", len(windows.ids))
    theirs = cached or _Live(base, windows, device)
    ours = _Live(own, windows, device)
    divergence = Divergence()
    pairs = zip(ours.logits(context.reporter.progress), theirs.logits(), strict=True)
    for (logits, said), targets in zip(pairs, _targets(windows), strict=True):
        divergence.add(said.to(logits.device), logits, targets)
    base_figures, figures = theirs.figures(), ours.figures()
    return Quality(
        text_digest=windows.digest,
        tokens=windows.predicted_tokens,
        **divergence.figures(),
        base=base.manifest.name,
        base_revision=base.manifest.revision,
        device=device,
        disk_bytes=own.manifest.disk_bytes,
        base_disk_bytes=base.manifest.disk_bytes,
        peak_memory_bytes=peak_memory_bytes(),
        **figures.model_dump(),
        **{f"base_{name}": value for name, value in base_figures.model_dump().items()},
    )


def cut_text(text: str, folder: Path, spec: EvaluationSpec) -> Windows:
    """Return the tokens that a model's tokenizer makes of a text, in windows.

    Raises LowbitError(INVALID_FIELD) for a text without two tokens.
    """
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    # Its file may say how training cut and filled texts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return cut(text, tokenizer, spec.max_tokens, spec.window_tokens)


def _targets(windows: Windows) -> Iterator[Sequence[int]]:
    """Yield the tokens that follow those of each chunk."""
    for window in windows.ids:
        for start in range(1, len(window), CHUNK_TOKENS):
            yield window[start : start + CHUNK_TOKENS]


def _cached(base: Subject, windows: Windows, device: str, context: Context) -> Entry | None:
    """Return what the base says of the text, computed now if need be; None if not kept."""
    cache = BaseCache(context.cache / "evaluations", context.cache_bytes)
    key = key_of(base.manifest.revision, windows.digest, _surroundings(device))
    if (entry := cache.find(key)) is not None:
        return entry
    if not cache.takes(windows.predicted_tokens * base.manifest.vocab_size * _MAX_LOGIT_BYTES):
        return None
    context.reporter.phase("evaluate", len(windows.ids))
    live = _Live(base, windows, device)
    cache.add(key, live.logits(context.reporter.progress), live.figures)
    del live
    gc.collect()
    return cache.find(key)


def _surroundings(device: str) -> dict[str, object]:
    """Return what a model's logits and speed depend on besides itself."""
    return {
        "device": device,
        "processor": processor_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "chunk_tokens": CHUNK_TOKENS,
        "decoder": _DECODER,
        "libraries": library_versions(),
    }


class _Live:
    """A model in memory, run on one row of tokens."""

    def __init__(self, subject: Subject, windows: Windows, device: str) -> None:
        """Load it; raises LowbitError: SOURCE_UNSUPPORTED, INVALID_FIELD."""
        self._windows = windows
        try:
            self._decoder = load(subject.folder, device, subject.manifest.context_tokens)
        except UnsupportedModelError as error:
            message = f"what a worker cannot run cannot be measured: {error}"
            raise LowbitError(Reason.SOURCE_UNSUPPORTED, message) from error
        context_tokens = self._decoder.spec.context_tokens
        if max(map(len, windows.ids)) > context_tokens:
            reason = f"{subject.manifest.name} runs in a context of {context_tokens} tokens"
            raise invalid("evaluation.window_tokens", reason)

    def logits(self, progress: Callable[[int], None] = lambda _: None) -> Iterator[Tensor]:
        """Yield the logits that predict each window's tokens, a chunk at a time.

        `progress` gets the number of windows that are done.
        """
        for done, window in enumerate(self._windows.ids, 1):
            yield from speed.prompt_logits(self._decoder, window[:-1])
            progress(done)

    def figures(self) -> Figures:
        """Measure size and speed, after a first use."""
        return Figures(
            live_bytes=self._decoder.live_bytes,
            prefill_tokens_per_second=speed.prefill_tokens_per_second(self._decoder),
            decode_tokens_per_second=speed.decode_tokens_per_second(self._decoder),
        )
