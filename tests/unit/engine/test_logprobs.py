"""Log-probabilities against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.engine.logprobs import SLICE_ROWS, AskedLogprobs, token_logprobs

VOCAB = 40
# Of a large number float32 keeps the leading digits only.
CLOSE = {"rel": 2 * float(np.finfo(np.float32).eps), "abs": 2e-5}


def reference(logits: torch.Tensor) -> np.ndarray:
    """Return the log-softmax of each row in float64."""
    values = logits.double().numpy()
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 2, SLICE_ROWS, SLICE_ROWS + 3]),
    scale=st.sampled_from([0.1, 3.0, 50.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_they_are_the_references(seed: int, rows: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, VOCAB, generator=generator)).to(dtype)
    tokens = torch.randint(VOCAB, (rows,), generator=generator).tolist()
    top = torch.randint(VOCAB + 3, (rows,), generator=generator).tolist()
    wanted = reference(logits)
    for row, found in enumerate(token_logprobs(logits, tokens, top)):
        assert found.logprob == pytest.approx(wanted[row, tokens[row]], **CLOSE)
        count = min(top[row], VOCAB)
        assert len(found.top_ids) == len(set(found.top_ids)) == count
        assert found.top_logprobs == pytest.approx(wanted[row, list(found.top_ids)], **CLOSE)
        assert found.top_logprobs == pytest.approx(-np.sort(-wanted[row])[:count], **CLOSE)


def test_only_rows_that_ask_are_answered_and_from_the_logits_as_they_were() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    wanted = reference(logits)
    asked = AskedLogprobs(logits, [None, 2, None, 0])
    logits.fill_(0)
    first, second, third, fourth = asked.of([1, 2, 3, 4])
    assert first is third is None
    assert second is not None
    assert fourth is not None
    assert second.logprob == pytest.approx(wanted[1, 2], abs=1e-5)
    assert second.top_ids == tuple(np.argsort(-wanted[1])[:2])
    assert fourth.logprob == pytest.approx(wanted[3, 4], abs=1e-5)
    assert fourth.top_ids == ()


def test_nobody_asks() -> None:
    assert AskedLogprobs(torch.zeros(2, VOCAB), [None, None]).of([1, 2]) == [None, None]
