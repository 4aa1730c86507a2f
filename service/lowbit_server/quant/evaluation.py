"""What quantizing cost: perplexity, KL divergence and agreement with another model.

Imports torch: for job processes only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lowbit_server.errors import invalid
from lowbit_server.quant.text import CHARACTERS_PER_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Tokens of held-out text in windows that do not overlap, and their digest."""

    ids: tuple[tuple[int, ...], ...]
    digest: str

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens that are predicted: all but the first of each window."""
        return sum(len(window) - 1 for window in self.ids)


def cut(text: str, tokenizer: Tokenizer, max_tokens: int, window_tokens: int) -> Windows:
    """Return the first `max_tokens` of a text, without special tokens, in windows.

    Raises LowbitError(INVALID_FIELD) when the text has no two tokens.
    """
    used = text[: max_tokens * CHARACTERS_PER_TOKEN]
    ids = tokenizer.encode(used, add_special_tokens=False).ids[:max_tokens]
    starts = range(0, len(ids), window_tokens)
    windows = tuple(tuple(ids[start : start + window_tokens]) for start in starts)
    # A rest of one token predicts nothing.
    windows = tuple(window for window in windows if len(window) > 1)
    if not windows:
        raise invalid("evaluation.source", "the text has less than two tokens")
    content = f"{window_tokens}\0{ids}".encode()
    return Windows(windows, hashlib.sha256(content).hexdigest())


class Divergence:
    """Compares the logits of two models for the same tokens, some tokens at a time."""

    def __init__(self) -> None:
        """Begin with no token."""
        # Rows of one number a predicted token each, as they come.
        self._parts: list[Tensor] = []

    def add(self, base: Tensor, own: Tensor, targets: Sequence[int]) -> None:
        """Take logits, (tokens, vocabulary) of any float type, and the tokens that came next."""
        # bf16 would lose the small differences that the divergence is made of.
        log_p, log_q = (logits.float().log_softmax(dim=1) for logits in (base, own))
        at = torch.tensor(targets, device=own.device).unsqueeze(1)
        part = (
            -log_p.gather(1, at).squeeze(1),
            -log_q.gather(1, at).squeeze(1),
            (log_p.exp() * (log_p - log_q)).sum(dim=1),
            (base.argmax(dim=1) == own.argmax(dim=1)).float(),
        )
        self._parts.append(torch.stack(part).cpu())

    def figures(self) -> dict[str, float]:
        """Return the fields of `Quality` that speak of quality.

        Perplexity is exp of the mean negative log-likelihood of all tokens; the divergence
        is KL(base || model) in nats of each token's distribution over the vocabulary.
        """
        base_nll, nll, kl, agrees = torch.cat(self._parts, dim=1).double().numpy()
        return {
            "perplexity": _perplexity(nll),
            "base_perplexity": _perplexity(base_nll),
            "mean_kl": float(kl.mean()),
            "median_kl": float(np.median(kl)),
            "p99_kl": float(np.quantile(kl, 0.99)),
            "max_kl": float(kl.max()),
            "top1_agreement": float(agrees.mean()),
        }


def _perplexity(nll: NDArray[np.float64]) -> float:
    with np.errstate(over="ignore"):  # a broken model's may be infinite
        return float(np.exp(nll.mean()))
