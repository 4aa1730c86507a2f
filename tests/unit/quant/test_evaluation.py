from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.evaluation import Windows, compare, cut
from lowbit_server.testing import byte_tokenizer

VOCABULARY = 50


class Table(torch.nn.Module):
    """A model whose logits depend on the last token only."""

    def __init__(self, noise: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        rows, errors = torch.randn(2, VOCABULARY, VOCABULARY, generator=generator)
        rows = 2 * rows + noise * errors
        self.rows = torch.nn.Parameter(rows.to(dtype), requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rows[input_ids])


def windows(*lengths: int) -> Windows:
    random = np.random.default_rng(0)
    return Windows(tuple(tuple(random.integers(0, VOCABULARY, n).tolist()) for n in lengths), "d")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_figures_are_those_of_an_independent_computation(dtype: torch.dtype) -> None:
    base, model, text = Table(0, dtype), Table(0.5, dtype), windows(40, 40, 7)
    calls: list[int] = []
    quality = compare(base, model, text, calls.append)

    def log_probabilities(table: Table, window: tuple[int, ...]) -> Any:
        logits = table.rows.double().numpy()[list(window[:-1])]
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    base_nll, nll, kl, agree = [], [], [], []
    for window in text.ids:
        p, q = log_probabilities(base, window), log_probabilities(model, window)
        for row, target in enumerate(window[1:]):
            base_nll.append(-p[row, target])
            nll.append(-q[row, target])
            kl.append((np.exp(p[row]) * (p[row] - q[row])).sum())
            agree.append(p[row].argmax() == q[row].argmax())
    assert quality.tokens == len(nll) == 39 + 39 + 6
    assert quality.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
    assert quality.base_perplexity == pytest.approx(np.exp(np.mean(base_nll)), rel=1e-6)
    assert quality.mean_kl == pytest.approx(np.mean(kl), rel=1e-6)
    assert quality.p99_kl == pytest.approx(np.quantile(kl, 0.99), rel=1e-6)
    assert quality.top1_agreement == pytest.approx(np.mean(agree))
    assert 0 < np.mean(agree) < 1
    assert quality.text_digest == "d"
    assert calls == [1, 2, 3]


def test_a_model_agrees_with_itself() -> None:
    quality = compare(Table(0), Table(0), windows(30), lambda _: None)
    assert quality.perplexity == quality.base_perplexity
    assert (quality.mean_kl, quality.p99_kl, quality.top1_agreement) == (0, 0, 1)


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
