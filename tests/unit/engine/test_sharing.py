"""Prompts found in the KV cache, outputs that are preempted, drafts, deterministic requests."""

from __future__ import annotations

from ctypes import c_int
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.lookup import PromptLookup
from lowbit_server.engine.reading import DETERMINISTIC_CHUNK_TOKENS
from lowbit_server.engine.request import Finish, Output, Request, Sampling
from lowbit_server.models.decoder import BLOCK_TOKENS
from tests.unit.engine.counting import VOCAB, CountingModel, expected

TOKEN = CountingModel().spec.token_bytes
PROMPT = tuple(index % VOCAB for index in range(3 * BLOCK_TOKENS + 5))
WILD = Sampling(temperature=50.0, seed=5)


def make(model: CountingModel, *, slots: int = 8, blocks: int = 1000) -> BatchingEngine:
    return BatchingEngine(model, slots, blocks * BLOCK_TOKENS * TOKEN)


def run(engine: BatchingEngine) -> list[Output]:
    outputs = []
    while engine.status().due is not None:
        outputs += engine.step()
        assert engine._kv.available <= engine._kv.blocks
    assert engine._kv.available == engine._kv.blocks, "a block was lost"
    return outputs


def play(engine: BatchingEngine, *requests: Request) -> dict[int, list[int]]:
    """Return the tokens of each request."""
    made: dict[int, list[int]] = {}
    for request in requests:
        assert engine.submit(request) == []
    for output in run(engine):
        assert not output.error
        made.setdefault(output.request, []).extend(output.token_ids)
    return made


def cached(engine: BatchingEngine, request: Request) -> int:
    """Run a request and return how many tokens of its prompt were found."""
    assert engine.submit(request) == []
    return max(output.cached_tokens for output in run(engine))


def test_whole_blocks_of_a_prompt_are_read_once() -> None:
    model = CountingModel()
    engine = make(model)
    assert cached(engine, Request(1, PROMPT, 3)) == 0
    reads = len(model.batches)
    assert cached(engine, Request(2, PROMPT, 3)) == 3 * BLOCK_TOKENS
    assert model.widths[reads] == 5
    assert play(engine, Request(3, PROMPT, 9)) == {3: expected(PROMPT, 9)}


def test_the_next_turn_of_a_chat_finds_the_answer_too() -> None:
    engine = make(CountingModel())
    (answer,) = play(engine, Request(1, PROMPT, 2 * BLOCK_TOKENS)).values()
    turn = (*PROMPT, *answer, 1, 2, 3)
    assert cached(engine, Request(2, turn, 3)) == 5 * BLOCK_TOKENS
    assert play(engine, Request(3, turn, 9)) == {3: expected(turn, 9)}


def test_of_a_prompt_that_is_known_to_the_last_token_something_is_read() -> None:
    engine = make(CountingModel())
    prompt = PROMPT[: 2 * BLOCK_TOKENS]
    assert cached(engine, Request(1, prompt, 1)) == 0
    assert cached(engine, Request(2, prompt, 1)) == BLOCK_TOKENS


def test_a_salt_parts_prompts() -> None:
    engine = make(CountingModel())
    assert cached(engine, Request(1, PROMPT, 1, cache_salt=b"a")) == 0
    assert cached(engine, Request(2, PROMPT, 1, cache_salt=b"b")) == 0
    assert cached(engine, Request(3, PROMPT, 1, cache_salt=b"a")) == 3 * BLOCK_TOKENS


def test_scores_find_their_prompt() -> None:
    engine = make(CountingModel())
    assert cached(engine, Request(1, PROMPT, 2, continuations=((1, 2), (3,)))) == 0
    assert cached(engine, Request(2, PROMPT, 2, continuations=((1, 2), (3,)))) == 3 * BLOCK_TOKENS


def test_log_probabilities_of_a_prompt_are_made_from_all_of_it() -> None:
    engine = make(CountingModel())
    cached(engine, Request(1, PROMPT, 1))
    engine.submit(Request(2, PROMPT, 1, logprobs=0, prompt_logprobs=True))
    outputs = run(engine)
    assert sum(len(output.prompt_logprobs) for output in outputs) == len(PROMPT) - 1
    assert outputs[-1].cached_tokens == 0


def test_a_prompt_that_broke_is_not_found() -> None:
    model = CountingModel()
    engine = make(model)
    model.breaks = {0}
    engine.submit(Request(1, PROMPT, 1))
    assert run(engine)[0].error
    assert cached(engine, Request(2, PROMPT, 1)) == 0
    assert play(engine, Request(3, PROMPT, 9)) == {3: expected(PROMPT, 9)}


def test_outputs_share_the_blocks_of_their_prompt() -> None:
    engine = make(CountingModel())
    engine.submit(Request(1, PROMPT, 5, n=4))
    engine.step()
    # Three whole ones together, and the fourth each.
    assert engine._kv.blocks - engine._kv.available == 3 + 4
    run(engine)


def test_the_last_output_waits_when_blocks_run_out_and_loses_nothing() -> None:
    model = CountingModel()
    engine = make(model, blocks=6)
    requests = [
        Request(number, PROMPT[number : BLOCK_TOKENS + 3], 3 * BLOCK_TOKENS, sampling=WILD)
        for number in (1, 2)
    ]
    wanted = {one.id: play(make(CountingModel()), one)[one.id] for one in requests}
    waited = False
    for request in requests:
        engine.submit(request)
    made: dict[int, list[int]] = {1: [], 2: []}
    while engine.status().due is not None:
        for output in engine.step():
            made[output.request] += output.token_ids
        waited |= bool(made[2]) and engine.status().waiting == 1
    assert waited
    assert made == wanted


@dataclass(frozen=True)
class Arrival:
    """A request and the step it comes with."""

    step: int
    request: Request


TEXTS = [PROMPT, PROMPT[:40], (*PROMPT[:50], 7, 7, 7), (1, 2, 3) * 20, (9,)]
arrivals = st.lists(
    st.builds(
        Arrival,
        st.integers(0, 40),
        st.builds(
            Request,
            st.just(0),
            st.sampled_from(TEXTS),
            st.integers(1, 80),
            st.sampled_from([Sampling(), WILD, replace(WILD, repetition_penalty=1.2)]),
            n=st.sampled_from([1, 1, 1, 3]),
            deterministic=st.booleans(),
            prompt_lookup_tokens=st.sampled_from([0, 0, 4]),
            cache_salt=st.sampled_from([b"a", b"b"]),
            prompt_logprobs=st.booleans(),
            logprobs=st.sampled_from([None, 0]),
        ),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(
    arrivals=arrivals,
    blocks=st.integers(6, 24),
    mixes=st.booleans(),
    interrupts=st.lists(st.booleans(), min_size=20, max_size=20),
)
def test_whatever_is_shared_drafted_or_preempted_each_output_is_as_if_alone(
    arrivals: list[Arrival], blocks: int, interrupts: list[bool], *, mixes: bool
) -> None:
    interrupt = c_int(0)
    budget_bytes = blocks * BLOCK_TOKENS * TOKEN
    engine = BatchingEngine(CountingModel(mixes=mixes), 5, budget_bytes, interrupt)
    made: dict[tuple[int, int], list[int]] = {}
    told = dict.fromkeys(range(len(arrivals)), 0)
    ends: list[tuple[int, int]] = []
    for step in range(10_000):
        for number, arrival in enumerate(arrivals):
            if arrival.step == step:
                assert engine.submit(replace(arrival.request, id=number)) == []
        interrupt.value = interrupts[step % len(interrupts)]
        for output in engine.step():
            assert not output.error
            assert len(output.logprobs) in (0, len(output.token_ids))
            made.setdefault((output.request, output.index), []).extend(output.token_ids)
            told[output.request] += len(output.prompt_logprobs)
            if output.finish:
                ends.append((output.request, output.index))
        if step > 40 and engine.status().due is None:
            break
    assert engine._kv.available == blocks, "a block was lost"
    assert sorted(ends) == sorted(set(ends))
    for number, arrival in enumerate(arrivals):
        request = arrival.request
        alone = make(CountingModel())
        alone.submit(replace(request, id=number, prompt_lookup_tokens=0))
        wanted: dict[tuple[int, int], list[int]] = {}
        for output in run(alone):
            wanted.setdefault((number, output.index), []).extend(output.token_ids)
        for key, tokens in wanted.items():
            room = blocks * BLOCK_TOKENS - len(request.prompt)
            assert made[key] == tokens[:room]
        assert told[number] == (len(request.prompt) - 1 if request.prompt_logprobs else 0)


def test_drafts_make_several_tokens_a_step() -> None:
    """Tokens of the counting model do not repeat, so its text is given to it as the prompt."""
    text = (1, 2, 3, *expected((1, 2, 3), 90))
    outputs: list[Output] = []
    model = CountingModel()
    engine = make(model)
    engine.submit(Request(1, text, 40, prompt_lookup_tokens=8, sampling=Sampling(top_k=1)))
    outputs = run(engine)
    assert [token for output in outputs for token in output.token_ids] == expected(text, 40)
    spans = [len(batch.spans[0].tokens) for batch in model.batches[1:]]
    assert max(spans) > 1


@given(tokens=st.lists(st.integers(0, 3), min_size=3, max_size=60), count=st.integers(0, 8))
def test_a_draft_is_what_followed_the_same_tokens_last(tokens: list[int], count: int) -> None:
    split = len(tokens) // 2
    lookup = PromptLookup(tokens[:split])
    lookup.follow(tokens[split:])
    wanted: list[int] = []
    for size in (2, 3):
        for place in range(size, len(tokens)):
            if tokens[place - size : place] == tokens[-size:]:
                wanted = tokens[place : place + count]
    assert list(lookup.draft(count)) == wanted


def test_deterministic_requests_are_computed_by_themselves() -> None:
    model = CountingModel()
    engine = make(model)
    free = [Request(number, PROMPT[:number], 30) for number in (1, 2)]
    exact = [Request(number, PROMPT, 9, deterministic=True) for number in (3, 4)]
    made = play(engine, *free, *exact)
    assert made[3] == made[4] == expected(PROMPT, 9)
    reads = [batch for batch in model.batches if batch.spans[0].tokens[:3] == PROMPT[:3]]
    assert [len(one.spans[0].tokens) for one in reads] == [DETERMINISTIC_CHUNK_TOKENS] * 2
    together = {len(batch.spans) for batch in model.batches if len(batch.spans) > 1}
    assert together == {2}


@pytest.mark.parametrize("blocks", [6, 9])
def test_a_deterministic_output_that_waited_is_computed_as_before(blocks: int) -> None:
    """Prompts in chunks of one size and then token by token, also the second time."""
    model = CountingModel()
    engine = make(model, blocks=blocks)
    requests = [
        Request(number, PROMPT[number:][: BLOCK_TOKENS + 3], 100, deterministic=True)
        for number in (1, 2, 3, 4)
    ]
    made = play(engine, *requests)
    assert made == {one.id: expected(one.prompt, 100) for one in requests}
    widths = [len(batch.spans[0].tokens) for batch in model.batches]
    assert set(widths) == {1, BLOCK_TOKENS + 3}
    assert widths.count(BLOCK_TOKENS + 3) > len(requests)


def test_context_limit_holds_with_drafts() -> None:
    engine = make(CountingModel(context_tokens=50))
    prompt = (1, 2, 3) * 15
    engine.submit(Request(1, prompt, 100, prompt_lookup_tokens=16))
    outputs = run(engine)
    assert outputs[-1].finish is Finish.CONTEXT_LIMIT
    assert [t for output in outputs for t in output.token_ids] == expected(prompt, 5)
