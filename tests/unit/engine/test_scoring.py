"""Scores of continuations, with a model whose every logit is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.engine.batching import SCORED_CHUNKS, BatchingEngine
from lowbit_server.engine.kv_cache import BLOCK_TOKENS
from lowbit_server.engine.request import Finish, Output, Request
from lowbit_server.models.decoder import CHUNK_TOKENS
from tests.unit.engine.counting import VOCAB, CountingModel, expected, expected_logprob

TOKEN = CountingModel().spec.token_bytes
PROMPT = (3, 1, 4, 1, 5)
GREEDY = tuple(expected(PROMPT, 3))

tokens = st.integers(0, VOCAB - 1)


def make(model: CountingModel, blocks: int = 40) -> BatchingEngine:
    return BatchingEngine(model, 4, blocks * BLOCK_TOKENS * TOKEN)


def request(
    continuations: tuple[tuple[int, ...], ...], prompt: tuple[int, ...] = PROMPT
) -> Request:
    longest = max(map(len, continuations))
    return Request(1, prompt, longest, continuations=continuations)


def run(engine: BatchingEngine) -> list[Output]:
    outputs = []
    while engine.status().due is not None:
        outputs += engine.step()
    return outputs


def check(
    outputs: list[Output], prompt: tuple[int, ...], wanted: tuple[tuple[int, ...], ...]
) -> None:
    assert [output.finish for output in outputs] == [None] * (len(wanted) - 1) + [Finish.MAX_TOKENS]
    assert [output.index for output in outputs] == list(range(len(wanted)))
    for output, continuation in zip(outputs, wanted, strict=True):
        logprobs = [
            expected_logprob((*prompt, *continuation[:at]), token)
            for at, token in enumerate(continuation)
        ]
        assert [one.logprob for one in output.logprobs] == pytest.approx(logprobs, abs=1e-5)
        assert output.greedy == (expected(prompt, len(continuation)) == list(continuation))


@settings(deadline=None)
@given(
    prompt=st.lists(tokens, min_size=1, max_size=9).map(tuple),
    continuations=st.lists(
        st.one_of(
            st.lists(tokens, min_size=1, max_size=6).map(tuple),
            st.integers(1, 6).map(lambda length: ("greedy", length)),
        ),
        min_size=1,
        max_size=6,
    ),
)
def test_each_token_is_judged_after_all_before_it(
    prompt: tuple[int, ...], continuations: list[tuple[int, ...] | tuple[str, int]]
) -> None:
    resolved = tuple(
        tuple(expected(prompt, one[1])) if one[0] == "greedy" else one for one in continuations
    )
    check(run_with_company(request(resolved, prompt)), prompt, resolved)


def run_with_company(scored: Request) -> list[Output]:
    """Run it beside requests that decode and end."""
    engine = make(CountingModel())
    for number, count in ((2, 2), (3, 7)):
        engine.submit(Request(number, (number,), count))
    outputs = engine.step()
    engine.submit(scored)
    outputs += run(engine)
    for number, count in ((2, 2), (3, 7)):
        made = [one for output in outputs if output.request == number for one in output.token_ids]
        assert made == expected((number,), count)
    return [output for output in outputs if output.request == 1]


def test_the_prompt_is_read_once_and_last_tokens_never() -> None:
    model = CountingModel()
    engine = make(model)
    long = tuple(index % VOCAB for index in range(CHUNK_TOKENS + 20))
    continuations = (GREEDY, (7,), long, (8, 9))
    engine.submit(request(continuations))
    check(run(engine), PROMPT, continuations)
    run_tokens = [tuple(batch.spans[0].tokens) for batch in model.batches]
    assert run_tokens == [PROMPT, GREEDY[:-1], long[:CHUNK_TOKENS], long[CHUNK_TOKENS:-1], (8,)]


def test_a_long_prompt_comes_in_chunks() -> None:
    prompt = tuple(index % VOCAB for index in range(2 * CHUNK_TOKENS + 5))
    engine = make(CountingModel())
    engine.submit(request(((1, 2), (3,)), prompt))
    check(run(engine), prompt, ((1, 2), (3,)))


def test_many_single_tokens_need_no_step_of_their_own() -> None:
    model = CountingModel()
    engine = make(model)
    continuations = tuple((token % VOCAB,) for token in range(1024))
    engine.submit(request(continuations))
    check(run(engine), PROMPT, continuations)
    assert len(model.batches) == 1


def test_a_cancelled_score_ends_and_leaves_room() -> None:
    engine = make(CountingModel())
    engine.submit(request(((1, 2, 3),) * 5))
    for _ in range(3):
        engine.step()
    assert engine.cancel(1) == [Output(1, finish=Finish.CANCELLED)]
    assert engine.status().running == 0
    engine.submit(request((GREEDY,)))
    check(run(engine), PROMPT, (GREEDY,))


@pytest.mark.parametrize("batch", [0, 1])
def test_a_failing_model_fails_the_score_alone(batch: int) -> None:
    for kind in ("fails", "breaks"):
        model = CountingModel()
        engine = make(model)
        setattr(model, kind, {batch})
        engine.submit(request(((1, 2, 3),)))
        (output,) = run(engine)
        assert output.error
        engine.submit(request((GREEDY,)))
        check(run(engine), PROMPT, (GREEDY,))


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    engine = make(CountingModel())
    assert engine.submit(request(((1, VOCAB),)))[0].error
    assert engine.status().due is None


def test_a_score_of_many_gives_way_to_those_who_wait() -> None:
    model = CountingModel()
    engine = make(model)
    many = tuple((token % VOCAB, 1 + token // VOCAB, 2) for token in range(5 * SCORED_CHUNKS))
    engine.submit(request(many))
    outputs = engine.step()
    for number in (2, 3):
        engine.submit(Request(number, (number,), 3))
    steps = 0
    while not any(output.request == 2 for output in outputs):
        outputs += engine.step()
        steps += 1
    assert steps <= SCORED_CHUNKS + 1
    outputs += run(engine)
    check([output for output in outputs if output.request == 1], PROMPT, many)
    for number in (2, 3):
        made = [one for output in outputs if output.request == number for one in output.token_ids]
        assert made == expected((number,), 3)
    # Once more after the others came, and never again while nobody waits.
    spans = [tuple(span.tokens) for batch in model.batches for span in batch.spans]
    assert spans.count(PROMPT) == 2


def test_a_score_that_waits_again_can_be_cancelled() -> None:
    engine = make(CountingModel())
    engine.submit(request(((1, 2, 3),) * (2 * SCORED_CHUNKS)))
    engine.step()
    engine.submit(Request(2, (2,), 500))
    while engine.status().waiting < 2:
        engine.step()
    assert engine.cancel(1) == [Output(1, finish=Finish.CANCELLED)]
    assert (engine.status().running, engine.status().waiting) == (0, 1)
