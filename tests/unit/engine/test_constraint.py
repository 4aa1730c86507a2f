"""Constraints beside everything else that has a say in the next token."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.finish import finish_reason
from lowbit_server.engine.request import Finish, Output, Request, Running, Sampling
from lowbit_server.engine.sampler import RowSampler, sample
from lowbit_server.grammar.spec import Grammar
from lowbit_server.models.decoder import BLOCK_TOKENS
from tests.unit.engine.counting import VOCAB, CountingModel, expected
from tests.unit.grammar.kit import END, SIZE, byte_vocabulary, token

if TYPE_CHECKING:
    from torch import Tensor

    from lowbit_server.grammar.matcher import Vocabulary
    from lowbit_server.models.decoder import Batch

CPU = torch.device("cpu")
A, B, Z = map(token, "abz")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return byte_vocabulary(tmp_path_factory.mktemp("bytes"))


class Outputs:
    """One output after the other of a constrained request."""

    def __init__(self, vocabulary: Vocabulary, pattern: str, **fields: Any) -> None:
        matcher = vocabulary.compile(Grammar("regex", pattern))
        plain = {"eos_token_ids": frozenset([END]), "sampling": Sampling()}
        request = Request(id=1, prompt=(1,), max_tokens=99, matcher=matcher, **(plain | fields))
        self.running = Running(request, index=0, context_tokens=999)
        self.sampler = RowSampler(self.running, SIZE, CPU)

    def take(self, logits: Tensor) -> int:
        """Choose a token."""
        (chosen,) = sample(logits[None].clone(), [self.sampler])
        self.running.tokens.append(chosen)
        return chosen

    def to_the_end(self, logits: Tensor) -> tuple[list[int], Finish | None]:
        """Choose tokens until one ends the output."""
        while not self.running.tokens or self.finish is None:
            self.take(logits)
        return self.running.tokens, self.finish

    @property
    def finish(self) -> Finish | None:
        """Why it has ended."""
        return finish_reason(self.running, 0.0)


def likes(*tokens: int) -> Tensor:
    """Return logits that prefer tokens, the first one most."""
    logits = torch.zeros(SIZE)
    for rank, one in enumerate(tokens):
        logits[one] = 100.0 - rank
    return logits


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, [A, END]),
        ({"min_tokens": 2}, [A, B, END]),
        # Nothing but to end is possible, whatever else was asked for.
        ({"min_tokens": 9}, [A, B, END]),
        ({"eos_token_ids": frozenset()}, [A, B, END]),
        ({"eos_token_ids": frozenset(), "min_tokens": 9}, [A, B, END]),
    ],
)
def test_it_ends_where_it_may_and_must(
    vocabulary: Vocabulary, fields: dict[str, Any], tokens: list[int]
) -> None:
    outputs = Outputs(vocabulary, "ab?", **fields)
    assert outputs.to_the_end(likes(END, Z)) == (tokens, Finish.EOS)


def test_a_stop_token_may_come_where_it_may_end(vocabulary: Vocabulary) -> None:
    stops = {"stop_token_ids": frozenset([Z])}
    assert Outputs(vocabulary, "aab?", **stops).to_the_end(likes(Z)) == ([A, A, Z], Finish.STOP)
    waits = Outputs(vocabulary, "aab?", **stops, min_tokens=3)
    assert waits.to_the_end(likes(Z)) == ([A, A, B, Z], Finish.STOP)


def test_a_stop_token_that_is_text_ends_it_in_the_middle(vocabulary: Vocabulary) -> None:
    outputs = Outputs(vocabulary, "aba", stop_token_ids=frozenset([B]))
    assert outputs.to_the_end(likes(Z)) == ([A, B], Finish.STOP)


def test_it_binds_before_top_k_and_temperature(vocabulary: Vocabulary) -> None:
    sampling = Sampling(temperature=0.5, top_k=1, top_p=0.1, seed=3)
    outputs = Outputs(vocabulary, "[ab]{3}", sampling=sampling)
    assert [outputs.take(likes(Z, B, A)) for _ in range(3)] == [B, B, B]


def test_bias_and_penalties_choose_among_what_is_allowed(vocabulary: Vocabulary) -> None:
    biased = Sampling(logit_bias=((A, 1000.0),))
    assert Outputs(vocabulary, "[ab]", sampling=biased).take(likes(Z, B)) == A
    punished = Outputs(vocabulary, "[ab]{2}", sampling=Sampling(frequency_penalty=50))
    assert [punished.take(likes(Z, B, A)) for _ in range(2)] == [B, A]


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": Sampling(bad_words=((B,),))},
        {"sampling": Sampling(bad_words=((A, B),), temperature=1.0)},
        {"stop_token_ids": frozenset([B]), "min_tokens": 9},
    ],
)
def test_a_conflict_ends_it_and_no_neighbour_notices(
    vocabulary: Vocabulary, fields: dict[str, Any]
) -> None:
    torn, free = Outputs(vocabulary, "ab", **fields), Outputs(vocabulary, "[ab]{4}")
    assert torn.take(likes(A)) == A
    logits = torch.stack([likes(A), likes(B)])
    chosen = sample(logits, [torn.sampler, free.sampler])
    assert chosen[1] == B
    assert "nothing of what it allows" in torn.sampler.refusal
    assert not free.sampler.refusal
    assert not logits.isnan().any()


def test_a_mask_that_fails_ends_it_and_no_neighbour_notices(vocabulary: Vocabulary) -> None:
    lost, free = Outputs(vocabulary, "ab"), Outputs(vocabulary, "[ab]{4}")
    lost.sampler.accept(Z)
    assert sample(torch.stack([likes(A), likes(B)]), [lost.sampler, free.sampler])[1] == B
    assert lost.sampler.refusal
    assert not free.sampler.refusal


def test_a_seed_gives_the_same_alone_and_beside_others(vocabulary: Vocabulary) -> None:
    logits = torch.randn(40, 3, SIZE, generator=torch.Generator().manual_seed(1))

    def make() -> list[Outputs]:
        hot = [Sampling(temperature=2.0, seed=seed) for seed in range(3)]
        return [Outputs(vocabulary, "[a-z]{40}", sampling=one) for one in hot]

    together, alone = make(), make()
    for row in logits:
        chosen = sample(row.clone(), [one.sampler for one in together])
        assert chosen == [one.take(row[index]) for index, one in enumerate(alone)]


class WideModel(CountingModel):
    """The counting model with a vocabulary of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = replace(self.spec, vocab_size=SIZE)

    def forward(self, batch: Batch) -> Tensor:
        return torch.nn.functional.pad(super().forward(batch), (0, SIZE - VOCAB))


def run(vocabulary: Vocabulary, requests: list[Request], tokens: int) -> tuple[Any, int]:
    """Run requests in a KV cache of so many tokens; return tokens, ends, and preemptions."""
    model = WideModel()
    engine = BatchingEngine(model, 16, tokens * model.spec.token_bytes)
    preempt, preempted = engine._roster.preempt, []
    engine._roster.preempt = lambda one: (preempted.append(one), preempt(one))[1]  # type: ignore[method-assign]
    outputs = [one for request in requests for one in engine.submit(request)]
    while engine.status().due is not None:
        outputs += engine.step()
    return gathered(outputs), len(preempted)


def gathered(outputs: list[Output]) -> dict[tuple[int, int], tuple[list[int], Any]]:
    found: dict[tuple[int, int], tuple[list[int], Any]] = {}
    for one in outputs:
        tokens, _ = found.get((one.request, one.index), ([], None))
        end = one.finish or (one.error, one.refused)
        found[one.request, one.index] = ([*tokens, *one.token_ids], end)
    return found


def requests(vocabulary: Vocabulary, **fields: Any) -> list[Request]:
    """Return free, constrained and impossible requests."""
    pattern = Grammar("regex", f"([a-z][0-9]){{{BLOCK_TOKENS}}}")
    matcher = vocabulary.compile(pattern)
    torn = vocabulary.compile(Grammar("choice", json.dumps(["ab"])))
    hot = Sampling(temperature=1.0, seed=5)
    plain = {"max_tokens": 3 * BLOCK_TOKENS, "eos_token_ids": frozenset([END])}
    return [
        Request(1, (1, 2, 3), **plain),
        Request(2, (4, 5), matcher=matcher, sampling=hot, n=3, **plain, **fields),
        Request(3, (6,), matcher=matcher, **plain, **fields),
        Request(4, (7,), matcher=torn, sampling=Sampling(bad_words=((B,),)), **plain),
    ]


def test_neighbours_preemption_and_drafts_change_nothing(vocabulary: Vocabulary) -> None:
    roomy, none = run(vocabulary, requests(vocabulary), 10_000)
    tight, some = run(vocabulary, requests(vocabulary), 9 * BLOCK_TOKENS)
    drafted, _ = run(vocabulary, requests(vocabulary, prompt_lookup_tokens=4), 10_000)
    assert (none, some > 0) == (0, True)
    assert roomy == tight == drafted
    assert roomy[1, 0][0] == expected((1, 2, 3), 3 * BLOCK_TOKENS)
    for key in ((2, 0), (2, 1), (2, 2), (3, 0)):
        tokens, end = roomy[key]
        assert end == Finish.EOS
        assert len(tokens) == 2 * BLOCK_TOKENS + 1
        assert tokens[-1] == END
    assert len({tuple(roomy[2, index][0]) for index in range(3)}) == 3
    tokens, (error, refused) = roomy[4, 0]
    assert tokens == [A]
    assert refused
    assert "nothing of what it allows" in error
