"""Chooses tokens from logits, for a batch of requests with their own settings."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from lowbit_server.engine.constraint import Constraint
from lowbit_server.grammar.spec import GrammarError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lowbit_server.engine.request import Running, Sampling
    from lowbit_server.grammar.matcher import Mask

# Nearly every nucleus lies within this many tokens; sorting a whole vocabulary is slow.
NUCLEUS_TOKENS = 1024
_MASK = (1 << 64) - 1


class RowSampler:
    """What the choice of one request's tokens depends on beside its logits.

    The random stream is its own and lives on the host, so that a seed gives the same
    tokens in any batch and on any device.
    """

    def __init__(self, running: Running, vocab_size: int, device: torch.device) -> None:
        """Start the request's random stream and remember its prompt."""
        request = running.request
        self.sampling = request.sampling
        self._running = running
        seed = _stream_seed(request.sampling.seed, running.index)
        self._generator = torch.Generator().manual_seed(_signed(seed))
        ends = request.eos_token_ids | request.stop_token_ids
        self._ends = [token for token in sorted(ends) if token < vocab_size]
        # Sequences by the token before their last: only those can be about to be completed.
        self._words: dict[int | None, list[tuple[int, ...]]] = defaultdict(list)
        for word in request.sampling.bad_words:
            self._words[word[-2] if len(word) > 1 else None].append(word)
        biased = request.sampling.logit_bias
        self._biased = torch.tensor([token for token, _ in biased], device=device)
        self._biases = torch.tensor([bias for _, bias in biased], device=device)
        self._constraint = Constraint(request.matcher) if request.matcher else None
        self.refusal = ""
        """Why nothing can be chosen any more; what is chosen all the same means nothing."""
        self._counts: Tensor | None = None
        if request.sampling.has_penalties:
            self._counts = torch.zeros(vocab_size, device=device)
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(request.prompt, device=device)] = True

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` has anything to do."""
        return (
            self._constraint is not None
            or self._counts is not None
            or self._too_short
            or len(self._biased) > 0
            or len(self._words) > 0
        )

    def adjust(self, logits: Tensor) -> None:
        """Apply bias, penalties, bad words, min_tokens and constraint to logits (vocabulary,).

        Works in place, in float32. Repetition: Keskar et al. 2019; the others as
        `generation.proto` says.
        """
        if len(self._biased):
            logits.index_add_(0, self._biased, self._biases)
        if self._counts is not None:
            sampling, penalty = self.sampling, self.sampling.repetition_penalty
            repeated = torch.where(logits > 0, logits / penalty, logits * penalty)
            torch.where(self._seen, repeated, logits, out=logits)
            logits -= sampling.frequency_penalty * self._counts
            logits -= sampling.presence_penalty * (self._counts > 0)
        mask = self._mask()
        if banned := self._banned(mask):
            logits[banned] = -math.inf
        if mask is not None and self._constraint is not None:
            self._constrain(logits, mask, self._constraint)

    def draw(self) -> float:
        """Return the stream's next number, uniform in [0, 1)."""
        return torch.rand((), dtype=torch.float64, generator=self._generator).item()

    def accept(self, token: int) -> None:
        """Remember a token that was chosen."""
        if self._counts is not None:
            self._counts[token] += 1
            self._seen[token] = True
        if self._constraint is not None and not self.refusal:
            self._running.complete = token in self._constraint.ends
            self._constraint.accept(token)

    def _mask(self) -> Mask | None:
        """Return what the constraint allows; None where there is none any more."""
        if self._constraint is None or self.refusal:
            return None
        try:
            return self._constraint.mask()
        except GrammarError as error:
            self.refusal = str(error)
            return None

    def _constrain(self, logits: Tensor, mask: Mask, constraint: Constraint) -> None:
        """Keep what the mask allows; an end only where it is due and may be."""
        request = self._running.request
        allowed = torch.from_numpy(mask.allowed)
        if mask.may_end:
            if not request.eos_token_ids and not mask.must_end:  # they are ignored
                allowed[constraint.ends] = False
            allowed[[one for one in self._ends if one in request.stop_token_ids]] = True
        logits.masked_fill_(~allowed.to(logits.device), -math.inf)
        if logits.amax() == -math.inf:
            self.refusal = "bad words, bias or min_tokens leave nothing of what it allows next"
            logits.zero_()

    @property
    def _too_short(self) -> bool:
        running = self._running
        return len(running.tokens) < running.request.min_tokens and len(self._ends) > 0

    def _banned(self, mask: Mask | None) -> list[int]:
        """Return the tokens that may not come next, whatever a constraint allows."""
        finished = mask is not None and mask.must_end
        banned = list(self._ends) if self._too_short and not finished else []
        tokens, prompt = self._running.tokens, self._running.request.prompt
        last = tokens[-1] if tokens else prompt[-1]
        for word in (*self._words.get(None, ()), *self._words.get(last, ())):
            before = len(word) - 1
            # Of the prompt only what such a word can reach into.
            reach = max(before - len(tokens), 0)
            seen = (*prompt[len(prompt) - reach :], *tokens[len(tokens) - before + reach :])
            if seen == word[:-1]:
                banned.append(word[-1])
        return banned


def sample(logits: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    """Return one token a row from logits (rows, vocabulary) float32, which are changed."""
    for row, sampler in enumerate(rows):
        if sampler.adjusts:
            sampler.adjust(logits[row])
    tokens = logits.max(-1).indices.tolist()  # argmax takes five times as long
    # Rows of equal settings share their kernels.
    groups: dict[tuple[float, int, float, float, float], list[int]] = defaultdict(list)
    for row, sampler in enumerate(rows):
        chosen = sampler.sampling
        if chosen.temperature > 0:
            key = (
                chosen.temperature,
                chosen.top_k,
                chosen.top_p,
                chosen.min_p,
                chosen.typical_p,
            )
            groups[key].append(row)
    for members in groups.values():
        first = rows[members[0]].sampling
        draws = [rows[row].draw() for row in members]
        for row, token in zip(members, _draw(logits[members], first, draws), strict=True):
            tokens[row] = token
    for sampler, token in zip(rows, tokens, strict=True):
        sampler.accept(token)
    return tokens


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Return what remains after temperature, top_k, top_p, min_p and typical_p, in this order.

    Takes logits (rows, vocabulary); returns weights (rows, k) float64, which need not add
    up to 1, and the token ids (rows, k) they belong to, None for the whole vocabulary.
    Nucleus: Holtzman et al. 2020; min_p: Nguyen et al. 2024; typical: Meister et al. 2022.
    """
    # float64: a tiny temperature does not overflow, a long sum keeps its small terms.
    scaled = logits.double() / sampling.temperature
    values, ids = scaled, None
    if 0 < sampling.top_k < scaled.shape[-1]:
        values, ids = scaled.topk(sampling.top_k)
        scaled = values
    total = scaled.logsumexp(-1, keepdim=True)
    if sampling.top_p < 1 and ids is None:
        values, ids = scaled.topk(min(NUCLEUS_TOKENS, scaled.shape[-1]))
        if bool(((values - total).exp().sum(-1) < sampling.top_p).any()):
            values, ids = scaled.sort(descending=True)
    weights = (values - total).exp()
    kept = weights >= sampling.min_p * weights.amax(-1, keepdim=True)
    if sampling.top_p < 1:
        kept &= weights.cumsum(-1) - weights < sampling.top_p
    weights = weights * kept
    if sampling.typical_p < 1:
        weights = weights * _typical(weights, sampling.typical_p)
    return weights, ids


def _typical(weights: Tensor, mass: float) -> Tensor:
    """Return which tokens, of weights (rows, k), make up the typical set of this mass."""
    probabilities = weights / weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(probabilities).sum(-1, keepdim=True)
    # What was removed before is infinitely far off and comes last.
    distance = (-probabilities.log() - entropy).abs()
    order = distance.argsort(dim=-1, stable=True)
    ordered = probabilities.gather(-1, order)
    kept = ordered.cumsum(-1) - ordered < mass
    return torch.empty_like(kept).scatter_(-1, order, kept)


def _draw(logits: Tensor, sampling: Sampling, draws: Sequence[float]) -> list[int]:
    """Invert the cumulative distribution of each row at its random number."""
    weights, ids = candidates(logits, sampling)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    uniform = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None]
    # Rounding must not lift the point to the total, which no token reaches beyond.
    point = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, point, right=True)
    chosen = index if ids is None else ids.gather(-1, index)
    return chosen[:, 0].tolist()


def _stream_seed(seed: int, index: int) -> int:
    """Return the seed of one of a request's outputs; the first has the request's own.

    SplitMix64 (Steele et al. 2014): the streams of neighbouring seeds do not meet.
    """
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
    return mixed ^ mixed >> 31


def _signed(seed: int) -> int:
    """Map an unsigned 64-bit seed onto what torch takes."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
