from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import JOB_REPORT, Measured
from lowbit_server.quant.evaluation import Divergence, cut
from lowbit_server.quant.quality import Quality
from lowbit_server.testing import byte_tokenizer

VOCABULARY = 50


def logits(seed: int, tokens: int, noise: float, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return logits (tokens, vocabulary) of a base and of a model that is off by some noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, errors = torch.randn(2, tokens, VOCABULARY, generator=generator)
    return (2 * rows).to(dtype), (2 * rows + noise * errors).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_figures_are_those_of_an_independent_computation(dtype: torch.dtype) -> None:
    divergence = Divergence()
    base_nll, nll, kl, agree = [], [], [], []
    for seed, tokens in enumerate((40, 40, 6)):
        base, model = logits(seed, tokens, 0.5, dtype)
        targets = np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tolist()
        divergence.add(base, model, targets)
        p, q = (
            one - np.log(np.exp(one).sum(axis=1, keepdims=True))
            for one in (base.double().numpy(), model.double().numpy())
        )
        for row, target in enumerate(targets):
            base_nll.append(-p[row, target])
            nll.append(-q[row, target])
            kl.append((np.exp(p[row]) * (p[row] - q[row])).sum())
            agree.append(p[row].argmax() == q[row].argmax())
    found = divergence.figures()
    assert len(kl) == 86
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
    assert found["base_perplexity"] == pytest.approx(np.exp(np.mean(base_nll)), rel=1e-6)
    assert found["mean_kl"] == pytest.approx(np.mean(kl), rel=1e-6)
    assert found["median_kl"] == pytest.approx(np.median(kl), rel=1e-5)
    assert found["p99_kl"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-5)
    assert found["max_kl"] == pytest.approx(np.max(kl), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(np.mean(agree))
    assert 0 < np.mean(agree) < 1


def test_a_model_agrees_with_itself() -> None:
    base, _ = logits(0, 30, 0, torch.float32)
    divergence = Divergence()
    divergence.add(base, base, range(30))
    found = divergence.figures()
    assert found["perplexity"] == found["base_perplexity"]
    assert (found["mean_kl"], found["max_kl"], found["top1_agreement"]) == (0, 0, 1)


def test_a_broken_model_has_figures_that_survive_the_way_to_the_front() -> None:
    base, model = logits(0, 30, 0.5, torch.float32)
    model[3] = torch.nan
    divergence = Divergence()
    divergence.add(base, 1e6 * model.nan_to_num(), range(30))
    assert divergence.figures()["perplexity"] == math.inf
    divergence.add(base, model, range(30))
    report = Measured(quality=Quality(text_digest="d", tokens=60, **divergence.figures()))
    read = JOB_REPORT.validate_json(report.model_dump_json())
    assert isinstance(read, Measured)
    assert math.isnan(read.quality.perplexity)
    assert math.isnan(read.quality.mean_kl or 0)
    assert read.quality.base_perplexity > 0


def test_windows_do_not_overlap() -> None:
    text = "abcdefghij"
    found = cut(text, byte_tokenizer(), max_tokens=9, window_tokens=4)
    ids = byte_tokenizer().encode(text).ids
    # The ninth token alone would predict nothing.
    assert found.ids == (tuple(ids[:4]), tuple(ids[4:8]))
    assert found.predicted_tokens == 6


def test_the_digest_names_text_and_cut() -> None:
    digests = {
        cut(text, byte_tokenizer(), max_tokens=limit, window_tokens=size).digest
        for text, limit, size in [
            ("abcdef", 6, 3),
            ("abcdeg", 6, 3),
            ("abcdef", 5, 3),
            ("abcdef", 6, 4),
        ]
    }
    assert len(digests) == 4
    # What lies beyond the limit is not measured.
    one, two = (cut(text, byte_tokenizer(), 3, 3).digest for text in ("abcd", "abcx"))
    assert one == two


def test_a_text_without_two_tokens_is_refused() -> None:
    for text in ("", "a"):
        with pytest.raises(LowbitError) as caught:
            cut(text, byte_tokenizer(), 16, 8)
        assert caught.value.reason is Reason.INVALID_FIELD
