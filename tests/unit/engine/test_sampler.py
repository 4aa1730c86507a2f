"""The sampler against an independent one in float64 numpy."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowbit_server.engine.request import Request, Running, Sampling
from lowbit_server.engine.sampler import RowSampler, candidates, sample

VOCAB = 24
CPU = torch.device("cpu")


def row(
    sampling: Sampling,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    vocab: int = VOCAB,
    index: int = 0,
    **fields: object,
) -> RowSampler:
    """Make the sampler of a request that has chosen `output` so far."""
    request = Request(id=1, prompt=prompt, max_tokens=99, sampling=sampling)
    running = Running(replace(request, **fields), index=index, context_tokens=999)
    sampler = RowSampler(running, vocab, CPU)
    for token in output:
        sampler.accept(token)
        running.tokens.append(token)
    return sampler


def penalized(
    logits: np.ndarray, sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...]
) -> np.ndarray:
    """Apply bias and penalties token by token, from their definitions in `generation.proto`."""
    result = logits.astype(np.float64)
    for token, bias in sampling.logit_bias:
        result[token] += bias
    for token in set(prompt) | set(output):
        factor = sampling.repetition_penalty
        result[token] = result[token] / factor if result[token] > 0 else result[token] * factor
    for token, count in Counter(output).items():
        result[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    return result


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def reference(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    """Return the distribution over the vocabulary, one filter after the other.

    Also returns how far the nearest token is from the edge of a filter: at the very edge
    rounding decides, which is not what is tested here.
    """
    scaled = logits / sampling.temperature
    order = np.argsort(-scaled)
    margin = 1.0
    if sampling.top_k:
        scaled[order[sampling.top_k :]] = -np.inf
    if sampling.top_p < 1:
        mass = softmax(scaled)[order].cumsum()
        margin = np.abs(mass - sampling.top_p).min()
        scaled[order[1 + int((mass < sampling.top_p).sum()) :]] = -np.inf
    probabilities = softmax(scaled)
    if sampling.min_p:
        ratio = probabilities / probabilities.max()
        margin = min(margin, np.abs(ratio - sampling.min_p).min())
        probabilities[ratio < sampling.min_p] = 0
    probabilities /= probabilities.sum()
    if sampling.typical_p < 1:
        probabilities, distance = typical(probabilities, sampling.typical_p)
        margin = min(margin, distance)
    return probabilities, margin


def typical(probabilities: np.ndarray, mass: float) -> tuple[np.ndarray, float]:
    """Keep the typical set, token by token, as Meister et al. 2022 define it in section 4."""
    possible = np.flatnonzero(probabilities)
    surprisal = -np.log(probabilities[possible])
    entropy = (probabilities[possible] * surprisal).sum()
    distance = np.abs(surprisal - entropy)
    order = np.argsort(distance)
    total = probabilities[possible][order].cumsum()
    count = 1 + int((total < mass).sum())
    kept = np.zeros_like(probabilities)
    kept[possible[order[:count]]] = probabilities[possible[order[:count]]]
    # At the edge: a mass that is just reached, or two tokens at about the same distance.
    gap = np.diff(distance[order])[count - 1 : count].min(initial=1.0)
    return kept / kept.sum(), min(np.abs(total - mass).min(), gap / 100)


tokens = st.integers(0, VOCAB - 1)
samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    top_k=st.integers(0, VOCAB + 3),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.05, 0.95)),
    logit_bias=st.lists(st.tuples(tokens, st.floats(-20, 20)), max_size=4).map(tuple),
)
# Distinct and far enough apart that float32 keeps their order.
logit_rows = st.lists(st.integers(-4000, 4000), min_size=VOCAB, max_size=VOCAB, unique=True).map(
    lambda values: np.array(values) / 400
)


@settings(deadline=None)
@given(
    logits=logit_rows,
    sampling=samplings,
    prompt=st.lists(tokens, min_size=1, max_size=6).map(tuple),
    output=st.lists(tokens, max_size=6).map(tuple),
)
def test_the_distribution_is_the_references(
    logits: np.ndarray, sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...]
) -> None:
    wanted_logits = penalized(logits, sampling, prompt, output)
    gaps = np.diff(np.sort(wanted_logits))
    assume(gaps.min() > 1e-4)
    wanted, margin = reference(wanted_logits, sampling)
    assume(margin > 1e-5)

    adjusted = torch.tensor(logits, dtype=torch.float32)
    row(sampling, prompt=prompt, output=output).adjust(adjusted)
    np.testing.assert_allclose(adjusted.numpy(), wanted_logits, rtol=1e-5, atol=1e-5)
    weights, ids = candidates(adjusted[None], sampling)
    found = np.zeros(VOCAB)
    found[np.arange(VOCAB) if ids is None else ids[0].numpy()] = weights[0].numpy()
    np.testing.assert_allclose(found / found.sum(), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=6),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=2.0, top_k=12, top_p=0.8, min_p=0.05),
        Sampling(temperature=1.0, typical_p=0.5),
        Sampling(temperature=1.5, top_k=20, top_p=0.95, typical_p=0.7),
    ],
)
def test_frequencies_follow_the_distribution(sampling: Sampling) -> None:
    draws = 4000
    logits = np.linspace(-2, 2, VOCAB)[np.random.default_rng(5).permutation(VOCAB)]
    expected = reference(logits, sampling)[0] * draws
    sampler = row(replace(sampling, seed=11))
    counts = np.zeros(VOCAB)
    for _ in range(draws):
        counts[sample(torch.tensor(logits, dtype=torch.float32)[None], [sampler])[0]] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # Wilson and Hilferty 1931: the cube root of chi-square is nearly normal. Fixed seeds:
    # this is the same number every time, far from an outlier.
    deviation = math.cbrt(statistic / freedom) - (1 - 2 / (9 * freedom))
    assert deviation / math.sqrt(2 / (9 * freedom)) < 3


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch() -> None:
    settings = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, seed=2),
        Sampling(temperature=0.8, top_p=0.9, seed=1),
        Sampling(temperature=0.8, top_p=0.9, seed=2**64 - 1),
        Sampling(temperature=1.0, top_k=5, repetition_penalty=1.3, seed=4),
    ]
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(30, len(settings), 5000, generator=generator)

    def play(members: list[int]) -> list[list[int]]:
        rows = [row(settings[member], vocab=5000) for member in members]
        chosen = [sample(step[members].clone(), rows) for step in steps]
        return [list(column) for column in zip(*chosen, strict=True)]

    together = play(list(range(len(settings))))
    for member in range(len(settings)):
        assert play([member]) == [together[member]]
    assert together[1] != together[2]


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [row(Sampling(seed=seed)) for seed in range(3)]
    assert sample(logits.clone(), rows) == logits.argmax(-1).tolist()


def test_greedy_minds_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4] = 2.0, 1.5
    assert sample(logits.clone(), [row(Sampling())]) == [3]
    strict = row(Sampling(repetition_penalty=2.0), prompt=(3,))
    assert sample(logits.clone(), [strict]) == [4]


def test_end_and_stop_tokens_are_out_until_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6], logits[0, 7] = 9.0, 8.0, 7.0
    ends = {"eos_token_ids": frozenset({5, 999}), "stop_token_ids": frozenset({6})}
    early = row(Sampling(), output=(1,), min_tokens=2, **ends)
    late = row(Sampling(), output=(1, 1), min_tokens=2, **ends)
    assert sample(logits.clone(), [early]) == [7]
    assert sample(logits.clone(), [late]) == [5]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 100.0])
def test_extreme_temperatures_give_tokens(temperature: float) -> None:
    logits = torch.linspace(-30, 30, VOCAB)[None]
    for top_p in (1.0, 1e-6):
        chosen = sample(logits.clone(), [row(Sampling(temperature=temperature, top_p=top_p))])
        assert 0 <= chosen[0] < VOCAB
        if temperature < 1 or top_p < 1:
            assert chosen == [VOCAB - 1]


def test_a_wide_nucleus_is_found_beyond_the_shortcut() -> None:
    vocab = 5000
    weights, ids = candidates(torch.zeros(1, vocab), Sampling(temperature=1.0, top_p=0.9))
    assert ids is not None
    assert int((weights > 0).sum()) == pytest.approx(0.9 * vocab, abs=1)


def test_typical_sampling_leaves_the_likeliest_out_where_it_says_too_little() -> None:
    # One token of probability 0.3 and many of little: the typical ones are the many.
    logits = torch.zeros(1, 2001)
    logits[0, 7] = math.log(2000 * 0.3 / 0.7)
    weights, _ = candidates(logits, Sampling(temperature=1.0, typical_p=0.2))
    assert weights[0, 7] == 0
    assert int((weights > 0).sum()) == pytest.approx(0.2 / 0.7 * 2000, abs=1)


def test_bias_moves_the_greedy_choice() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 2.0
    toward = Sampling(logit_bias=((4, 1.5), (4, 1.0), (3, 0.2)))
    assert sample(logits.clone(), [row(toward)]) == [4]
    assert sample(logits.clone(), [row(Sampling(logit_bias=((3, -1000.0),)))]) != [3]


@settings(deadline=None)
@given(
    words=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=6),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    output=st.lists(st.integers(0, 2), max_size=5).map(tuple),
)
def test_a_bad_word_is_never_completed(
    words: list[tuple[int, ...]], prompt: tuple[int, ...], output: tuple[int, ...]
) -> None:
    adjusted = torch.zeros(VOCAB)
    row(Sampling(bad_words=tuple(words)), prompt=prompt, output=output).adjust(adjusted)
    for token in range(VOCAB):
        text = (*prompt, *output, token)
        completed = any(text[-len(word) :] == word for word in words)
        assert (adjusted[token] == -math.inf) == completed


def test_bad_words_are_out_however_likely_they_are() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 5] = 50.0
    rows = [row(Sampling(temperature=1.0, bad_words=((1, 5),)), output=(out,)) for out in (1, 2)]
    for _ in range(200):
        first, second = sample(logits.clone(), rows)
        assert first != 5
        assert second == 5


def test_outputs_of_a_request_have_streams_of_their_own() -> None:
    logits = torch.zeros(1, 5000)

    def play(seed: int, index: int) -> list[int]:
        one = row(Sampling(temperature=1.0, seed=seed), vocab=5000, index=index)
        return [sample(logits.clone(), [one])[0] for _ in range(8)]

    streams = [play(seed, index) for seed in (1, 2, 2**64 - 1) for index in range(4)]
    assert len({tuple(stream) for stream in streams}) == len(streams)
    assert play(1, 3) == streams[3]
