"""Evaluation in the test's own process: what is loaded, and a real model's figures."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lowbit_server.jobs import evaluating
from lowbit_server.jobs.spec import EvaluationSpec
from lowbit_server.models.loading import load
from lowbit_server.models.transformers import place
from lowbit_server.quant.schemes import RtnScheme
from lowbit_server.quant.text import builtin_text
from tests.models.quantkit import FAMILIES, Store, random_source

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from lowbit_server.models.decoder import DecoderModel

SPEC = EvaluationSpec(text_inline=("some words that are held out " * 9,), window_tokens=60)
RTN = RtnScheme(group_size=32)
QUALITY = {"perplexity", "base_perplexity", "mean_kl", "median_kl", "p99_kl", "max_kl"}
QUALITY |= {"top1_agreement", "tokens", "text_digest"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that evaluations load."""
    names: list[str] = []

    def noted(folder: Path, device: str, context_tokens: int) -> DecoderModel:
        names.append(folder.name)
        return load(folder, device, context_tokens)

    monkeypatch.setattr(evaluating, "load", noted)
    return names


def measured(store: Store, name: str) -> dict[str, object]:
    store.quantized(RTN, name, SPEC)
    quality = store.manifest(name).quality
    assert quality is not None
    return quality.model_dump(include=QUALITY)


def test_a_hit_gives_the_same_figures_without_loading_the_base(
    store: Store, tmp_path: Path, loaded: list[str]
) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-untied"]))
    first = measured(store, "first")
    assert loaded == ["base", "first"]
    assert measured(store, "second") == first
    assert loaded == ["base", "first", "second"]
    speeds = [store.manifest(name).quality for name in ("first", "second")]
    assert len({one and one.base_decode_tokens_per_second for one in speeds}) == 1
    shutil.rmtree(tmp_path / "cache")
    store.cache_bytes = 0
    assert measured(store, "third") == first
    assert loaded[3:] == ["base", "third"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_damaged_entry_is_computed_again(store: Store, tmp_path: Path, loaded: list[str]) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-untied"]))
    first = measured(store, "first")
    (file,) = (tmp_path / "cache" / "evaluations").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    assert measured(store, "second") == first
    assert loaded == ["base", "first", "base", "second"]


def test_a_real_models_figures_are_those_of_plain_forward_passes_in_float64(
    smollm2_bf16: Path, store: Store
) -> None:
    """The serving path reads windows of 600 tokens in two chunks; the reference at once."""
    (store.models / "base").symlink_to(smollm2_bf16)
    small = store.quantized(RtnScheme(), "small", EvaluationSpec(max_tokens=900, window_tokens=600))
    found = store.manifest("small").quality
    assert found is not None
    tokenizer = Tokenizer.from_file(str(smollm2_bf16 / "tokenizer.json"))
    ids = tokenizer.encode(builtin_text().evaluation[:60_000], add_special_tokens=False).ids[:900]
    windows = [ids[:600], ids[600:]]
    targets = [token for window in windows for token in window[1:]]

    def log_probabilities(folder: Path) -> NDArray[np.float64]:
        model = place(folder, "cpu")
        with torch.inference_mode():
            rows = [model(torch.tensor([one])).logits[0, :-1].double().numpy() for one in windows]
        logits = np.concatenate(rows)
        shifted = logits - logits.max(axis=1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))

    p, q = log_probabilities(smollm2_bf16), log_probabilities(small)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    at = np.arange(len(targets))
    assert found.tokens == len(targets) == 898
    # Chunks round otherwise than whole windows do: a few parts in a thousand in bf16.
    assert found.base_perplexity == pytest.approx(np.exp(-p[at, targets].mean()), rel=0.01)
    assert found.perplexity == pytest.approx(np.exp(-q[at, targets].mean()), rel=0.01)
    assert found.mean_kl == pytest.approx(kl.mean(), rel=0.01)
    # The base's products are of other kernels here, which moves single tokens more than the mean.
    assert found.median_kl == pytest.approx(np.median(kl), rel=0.05)
    assert found.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=0.05)
    agreement = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert found.top1_agreement == pytest.approx(agreement, abs=0.01)
    assert 0.1 < found.mean_kl < 0.6
    assert found.live_bytes < 0.6 * found.base_live_bytes
