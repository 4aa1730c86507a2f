"""Measures what quantizing cost: perplexity, KL divergence and agreement with the source.

Imports torch: for job processes only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowbit_server.errors import invalid
from lowbit_server.quant.text import CHARACTERS_PER_TOKEN
from lowbit_server.store.manifest import Quality

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tokenizers import Tokenizer


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


@dataclass(frozen=True, slots=True)
class _Scores:
    """One value a predicted token."""

    base_nll: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor


def compare(
    base: torch.nn.Module,
    model: torch.nn.Module,
    windows: Windows,
    progress: Callable[[int], None],
) -> Quality:
    """Measure a model against the one it was made from, on the same tokens.

    Perplexity is exp of the mean negative log-likelihood of all predicted tokens; the
    divergence is KL(base || model) in nats per predicted token. `progress` gets the number
    of windows that are done.
    """
    parts = []
    with torch.inference_mode():
        for done, window in enumerate(windows.ids, 1):
            parts.append(_score(_log_probabilities(base, window), model, window))
            progress(done)
    base_nll = torch.cat([part.base_nll for part in parts]).double()
    nll = torch.cat([part.nll for part in parts]).double()
    kl = torch.cat([part.kl for part in parts]).double()
    agrees = torch.cat([part.agrees for part in parts]).double()
    return Quality(
        text_digest=windows.digest,
        tokens=windows.predicted_tokens,
        perplexity=math.exp(nll.mean().item()),
        base_perplexity=math.exp(base_nll.mean().item()),
        mean_kl=kl.mean().item(),
        p99_kl=kl.quantile(0.99).item(),
        top1_agreement=agrees.mean().item(),
    )


def _score(base: torch.Tensor, model: torch.nn.Module, window: Sequence[int]) -> _Scores:
    """Compare with the base's log-probabilities, float32 (tokens - 1, vocabulary)."""
    own = _log_probabilities(model, window)
    targets = torch.tensor(window[1:], device=own.device).unsqueeze(1)
    return _Scores(
        base_nll=-base.gather(1, targets).squeeze(1),
        nll=-own.gather(1, targets).squeeze(1),
        kl=(base.exp() * (base - own)).sum(dim=1),
        agrees=base.argmax(dim=1) == own.argmax(dim=1),
    )


def _log_probabilities(model: torch.nn.Module, window: Sequence[int]) -> torch.Tensor:
    device = next(model.parameters()).device
    ids = torch.tensor([window], device=device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    # bf16 would lose the small differences that the divergence is made of.
    return logits[0, :-1].float().log_softmax(dim=1)
