from __future__ import annotations

from collections import defaultdict
from ctypes import c_int
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.pacing import LEAST_TOKENS
from lowbit_server.engine.request import Finish, Output, Request, Sampling
from lowbit_server.models.decoder import BLOCK_TOKENS, CHUNK_TOKENS
from tests.unit.engine.counting import VOCAB, CountingModel, expected, expected_logprob

TOKEN = CountingModel().spec.token_bytes


class Log:
    """All that an engine said, by request, and by request and index."""

    def __init__(self) -> None:
        self.all_tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.all_ends: dict[tuple[int, int], list[Finish | str]] = defaultdict(list)

    @property
    def tokens(self) -> dict[int, list[int]]:
        return _firsts(self.all_tokens)

    @property
    def ends(self) -> dict[int, list[Finish | str]]:
        return _firsts(self.all_ends)

    def add(self, outputs: list[Output]) -> None:
        keys = [(output.request, output.index) for output in outputs]
        assert len(set(keys)) == len(keys)
        for key, output in zip(keys, outputs, strict=True):
            assert not self.all_ends[key], "something came after the end"
            self.all_tokens[key] += output.token_ids
            if output.finish or output.error:
                self.all_ends[key].append(output.finish or output.error)


def _firsts(found: dict[tuple[int, int], list[Any]]) -> dict[int, list[Any]]:
    return {request: value for (request, index), value in found.items() if not index}


def make(model: CountingModel, *, slots: int = 8, tokens: int = 100_000) -> BatchingEngine:
    return BatchingEngine(model, slots, tokens * TOKEN)


def prompt(number: int, length: int) -> tuple[int, ...]:
    return tuple((number * 37 + index) % VOCAB for index in range(length))


def run(engine: BatchingEngine, log: Log) -> None:
    while engine.status().due is not None:
        log.add(engine.step())


@dataclass(frozen=True)
class Arrival:
    """A request, the step it comes with and the step it is cancelled with, if at all."""

    step: int
    length: int
    max_tokens: int
    cancelled_after: int | None
    n: int


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        length=st.one_of(st.integers(1, 40), st.integers(400, 1400)),
        max_tokens=st.integers(1, 40),
        cancelled_after=st.one_of(st.none(), st.integers(0, 20)),
        n=st.sampled_from([1, 1, 1, 2, 4]),
    ),
    min_size=1,
    max_size=12,
)


def check_output(
    arrival: Arrival,
    number: int,
    tokens: list[int],
    ends: list[Finish | str],
    context: int,
) -> None:
    (end,) = ends
    assert tokens == expected(prompt(number, arrival.length), len(tokens))
    room = max(context - arrival.length, 0)
    if end is Finish.CANCELLED:
        assert arrival.cancelled_after is not None
    elif end is Finish.CONTEXT_LIMIT:
        assert len(tokens) == room <= arrival.max_tokens
    else:
        assert end is Finish.MAX_TOKENS
        assert len(tokens) == arrival.max_tokens < room


@settings(deadline=None)
@given(
    arrivals=arrivals,
    slots=st.integers(1, 5),
    blocks=st.integers(2, 96),
    mixes=st.booleans(),
    interrupts=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_every_request_gets_its_own_tokens_and_ends_once(
    arrivals: list[Arrival], slots: int, blocks: int, interrupts: list[bool], *, mixes: bool
) -> None:
    model = CountingModel(context_tokens=1200, mixes=mixes)
    budget_tokens = blocks * BLOCK_TOKENS
    interrupt = c_int(0)
    engine = BatchingEngine(model, slots, budget_tokens * TOKEN, interrupt)
    log = Log()
    step = 0
    while step <= 51 or engine.status().due is not None:
        for number, arrival in enumerate(arrivals):
            if arrival.step == step:
                request = Request(
                    number, prompt(number, arrival.length), arrival.max_tokens, n=arrival.n
                )
                log.add(engine.submit(request))
            if step - arrival.step == arrival.cancelled_after:
                log.add(engine.cancel(number))
        interrupt.value = interrupts[step % len(interrupts)]
        log.add(engine.step())
        status = engine.status()
        assert status.running <= slots
        assert status.kv_bytes <= budget_tokens * TOKEN
        step += 1
    for number, arrival in enumerate(arrivals):
        if arrival.n > slots:
            (refusal,) = log.all_ends.pop((number, 0))
            assert "more than" in str(refusal)
            continue
        context = min(1200, budget_tokens)
        for index in range(arrival.n):
            ends = log.all_ends.pop((number, index))
            check_output(arrival, number, log.all_tokens[number, index], ends, context)
    assert not any(log.all_ends.values())
    assert engine.status().running == engine.status().waiting == 0
    assert engine._kv.available == blocks, "a block was lost"


def test_a_long_prompt_comes_in_chunks_beside_running_requests() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    long = prompt(2, 3 * CHUNK_TOKENS - 1)
    engine.submit(Request(1, prompt(1, 5), 2 + len(long) // LEAST_TOKENS))
    log.add(engine.step())
    engine.submit(Request(2, long, 4))
    made = 1
    while 2 not in log.tokens:
        log.add(engine.step())
        made += 1
        assert len(log.tokens[1]) == made
    widths = [width for width in model.widths if width > 5]
    assert sum(widths) == len(long)
    assert min(widths[:-1]) >= LEAST_TOKENS
    assert max(widths) <= CHUNK_TOKENS
    run(engine, log)
    assert log.tokens[2] == expected(long, 4)


def test_requests_that_run_are_one_batch() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    for number in range(4):
        engine.submit(Request(number, prompt(number, 3), 10))
    run(engine, log)
    assert max(len(batch.spans) for batch in model.batches) == 4
    assert all(log.tokens[number] == expected(prompt(number, 3), 10) for number in range(4))


def test_a_waiting_request_takes_the_place_of_one_that_ends() -> None:
    engine, log = make(CountingModel(), slots=1), Log()
    for number in range(3):
        engine.submit(Request(number, prompt(number, 3), 2))
    run(engine, log)
    assert [log.ends[number] for number in range(3)] == [[Finish.MAX_TOKENS]] * 3


def test_a_failing_step_ends_its_own_requests_only() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    engine.submit(Request(1, prompt(1, 3), 10))
    log.add(engine.step())
    engine.submit(Request(2, prompt(2, 3), 10))
    model.fails = {len(model.batches)}  # 2's prompt comes before the next token of 1
    run(engine, log)
    assert log.ends[1] == [Finish.MAX_TOKENS]
    assert log.ends[2] == ["RuntimeError in the engine: the model broke"]
    engine.submit(Request(3, prompt(3, 3), 2))
    run(engine, log)
    assert log.tokens[3] == expected(prompt(3, 3), 2)


def test_a_row_that_is_not_a_number_fails_alone_and_leaves_nothing() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    for number in (1, 2):
        engine.submit(Request(number, prompt(number, 3), 6))
        log.add(engine.step())
    model.breaks = {len(model.batches)}
    run(engine, log)
    assert log.ends[1] == [Finish.MAX_TOKENS]
    assert log.tokens[1] == expected(prompt(1, 3), 6)
    assert log.ends[2] == ["the model's logits are not numbers"]


def test_a_token_that_the_model_does_not_know_is_refused() -> None:
    engine = make(CountingModel())
    assert engine.submit(Request(1, (1, VOCAB), 5))[0].error
    assert engine.status().due is None


def test_a_cancelled_prompt_gives_its_row_up() -> None:
    engine, log = make(CountingModel()), Log()
    engine.submit(Request(1, prompt(1, 3), 10))
    engine.submit(Request(2, prompt(2, 4 * CHUNK_TOKENS), 10))
    for _ in range(3):
        log.add(engine.step())
    log.add(engine.cancel(2))
    run(engine, log)
    assert log.ends[2] == [Finish.CANCELLED]
    assert log.tokens[1] == expected(prompt(1, 3), 10)


def test_time_runs_out_in_the_queue_too() -> None:
    engine, log = make(CountingModel(), slots=1), Log()
    engine.submit(Request(1, prompt(1, 3), 3))
    engine.submit(Request(2, prompt(2, 3), 3, ends_by=0.0))
    run(engine, log)
    assert log.ends[2] == [Finish.TIME_LIMIT]
    assert log.tokens[2] == []


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(MemoryError):
        make(CountingModel(), tokens=BLOCK_TOKENS - 1)


def test_several_outputs_come_from_one_prefill() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    engine.submit(Request(1, prompt(1, 4), 9))
    log.add(engine.step())
    engine.submit(Request(2, prompt(2, 700), 3, n=4))
    run(engine, log)
    widths = [width for width in model.widths if width > 4]
    assert sum(widths) == 700
    assert log.tokens[1] == expected(prompt(1, 4), 9)
    for index in range(4):
        assert log.all_tokens[2, index] == expected(prompt(2, 700), 3)
        assert log.all_ends[2, index] == [Finish.MAX_TOKENS]


def test_an_output_is_the_same_alone_and_beside_its_siblings() -> None:
    wild = Sampling(temperature=50.0, seed=5)
    request = Request(1, prompt(1, 4), 12, sampling=wild)
    alone, together = Log(), Log()
    for log, n in ((alone, 1), (together, 3)):
        engine = make(CountingModel())
        engine.submit(replace(request, n=n))
        run(engine, log)
    made = [tuple(together.all_tokens[1, index]) for index in range(3)]
    assert len(set(made)) == 3
    assert made[0] == tuple(alone.tokens[1])


def test_one_output_is_cancelled_and_the_others_go_on() -> None:
    engine, log = make(CountingModel()), Log()
    engine.submit(Request(1, prompt(1, 2 * CHUNK_TOKENS), 5, n=3))
    log.add(engine.step())
    log.add(engine.cancel(1, 0))  # while the prompt is read
    for _ in range(2):
        log.add(engine.step())
    log.add(engine.cancel(1, 1))
    run(engine, log)
    assert [log.all_ends[1, index] for index in range(3)] == [
        [Finish.CANCELLED],
        [Finish.CANCELLED],
        [Finish.MAX_TOKENS],
    ]
    assert log.all_tokens[1, 2] == expected(prompt(1, 2 * CHUNK_TOKENS), 5)


def test_a_failing_prefill_ends_all_outputs() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    model.fails = {0}
    engine.submit(Request(1, prompt(1, 3), 5, n=3))
    run(engine, log)
    assert len(log.all_ends) == 3
    assert engine._kv.available == engine._kv.blocks


@pytest.mark.parametrize("length", [1, 2, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 7])
def test_a_prompt_has_log_probabilities_too(length: int) -> None:
    given_tokens = prompt(1, length)
    engine = make(CountingModel())
    engine.submit(Request(1, given_tokens, 2, logprobs=3, prompt_logprobs=True))
    outputs = []
    while engine.status().due is not None:
        outputs += engine.step()
    found = [one for output in outputs for one in output.prompt_logprobs]
    assert len(found) == length - 1
    for position, one in enumerate(found, start=1):
        wanted = expected_logprob(given_tokens[:position], given_tokens[position])
        assert one.logprob == pytest.approx(wanted, abs=1e-5)
        assert len(one.top_ids) == 3
        assert one.top_ids[:1] == tuple(expected(given_tokens[:position], 1))
    made = [one for output in outputs for one in output.token_ids]
    assert made == expected(given_tokens, 2)
    assert all(len(output.logprobs) == len(output.token_ids) for output in outputs)


def test_log_probabilities_are_of_the_models_own_logits() -> None:
    given_tokens = prompt(1, 3)
    likeliest, *_ = expected(given_tokens, 1)
    other = (likeliest + 1) % VOCAB
    engine, outputs = make(CountingModel()), []
    settings_ = Sampling(temperature=0.1, top_k=1, logit_bias=((other, 100.0),))
    engine.submit(Request(1, given_tokens, 1, sampling=settings_, logprobs=1))
    engine.submit(Request(2, given_tokens, 1))
    while engine.status().due is not None:
        outputs += engine.step()
    first, second = outputs
    assert first.token_ids == (other,)
    (found,) = first.logprobs
    assert found.logprob == pytest.approx(expected_logprob(given_tokens, other), abs=1e-5)
    assert found.top_ids == (likeliest,)
    assert second.logprobs == ()


def test_prompts_are_read_with_the_tokens_of_streams_where_that_saves_time() -> None:
    model = CountingModel(mixes=True)
    engine, log = make(model), Log()
    log.add(engine.submit(Request(1, prompt(1, 5), 20)))
    while engine.status().running + engine.status().waiting and len(model.batches) < 4:
        log.add(engine.step())
    log.add(engine.submit(Request(2, prompt(2, 600), 3)))
    before = len(model.batches)
    log.add(engine.step())
    (read,) = model.batches[before:]
    assert [len(span.tokens) > 1 for span in read.spans] == [False, True]
    run(engine, log)
    for number, length, count in ((1, 5, 20), (2, 600, 3)):
        assert log.all_tokens[number, 0] == expected(prompt(number, length), count)


def test_short_prompts_are_read_before_the_next_tokens_of_streams_but_not_for_ever() -> None:
    engine, log = make(CountingModel()), Log()
    log.add(engine.submit(Request(1, prompt(1, 5), 20)))
    log.add(engine.step())
    engine._pacing.chunk_tokens = lambda *, beside_streams: 20  # type: ignore[method-assign]
    made = []
    for number in range(2, 7):
        log.add(engine.submit(Request(number, prompt(number, 15), 9)))
        outputs = engine.step()
        made.append([output.request for output in outputs])
        log.add(outputs)
    # 4 would make more than 40 tokens: the streams' turn comes first.
    assert made == [[2], [3], [1, 2, 3, 4], [5], [6]]


def test_a_request_that_comes_during_a_step_ends_it_without_effect() -> None:
    interrupt = c_int(0)
    model = CountingModel()
    engine, log = BatchingEngine(model, 3, 100 * BLOCK_TOKENS * TOKEN, interrupt), Log()
    log.add(engine.submit(Request(1, prompt(1, 5), 20)))
    log.add(engine.step())
    interrupt.value = 1
    assert engine.step() == []
    log.add(engine.submit(Request(2, prompt(2, 6), 20)))
    for wanted in ([2], [1, 2]):  # its prompt is next, and then tokens for both, whoever comes
        outputs = engine.step()
        assert [output.request for output in outputs] == wanted
        log.add(outputs)
    # Interrupted once, the next pass goes through where there is nothing to read.
    assert engine.step() == []
    log.add(engine.step())
    assert len(log.tokens[1]) == 3
    log.add(engine.submit(Request(3, prompt(3, 6), 20)))
    log.add(engine.step())
    # Without a slot for another request there is no reason to interrupt.
    for _ in range(2):
        made = len(log.tokens[1])
        log.add(engine.step())
        assert len(log.tokens[1]) == made + 1
    run(engine, log)
    for number, length in ((1, 5), (2, 6), (3, 6)):
        assert log.tokens[number] == expected(prompt(number, length), 20)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_pass_that_fails_for_several_is_done_for_each(*, mixes: bool) -> None:
    model = CountingModel(mixes=mixes)
    engine, log = make(model), Log()
    log.add(engine.submit(Request(1, prompt(1, 5), 20)))
    for _ in range(3):
        log.add(engine.step())
    for number in (2, 3):
        log.add(engine.submit(Request(number, prompt(number, 6), 3)))
    # Both prompts are read together, and then one by one.
    joint = len(model.batches)
    model.fails = {joint, joint + 1}
    run(engine, log)
    failed = [number for number in (1, 2, 3) if "broke" in str(log.all_ends[number, 0][-1])]
    assert failed == [2]
    for number, length, count in ((1, 5, 20), (3, 6, 3)):
        assert log.all_tokens[number, 0] == expected(prompt(number, length), count)


def test_a_mixed_pass_that_fails_is_done_apart() -> None:
    model = CountingModel(mixes=True)
    engine, log = make(model), Log()
    log.add(engine.submit(Request(1, prompt(1, 5), 20)))
    for _ in range(3):
        log.add(engine.step())
    log.add(engine.submit(Request(2, prompt(2, 600), 3)))
    model.fails = {len(model.batches)}
    run(engine, log)
    for number, length, count in ((1, 5, 20), (2, 600, 3)):
        assert log.all_tokens[number, 0] == expected(prompt(number, length), count)


def test_a_prompt_that_begins_like_one_that_is_read_waits_for_it() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    shared = prompt(1, 2 * BLOCK_TOKENS)
    for number in (1, 2):
        log.add(engine.submit(Request(number, (*shared, number), 2)))
    run(engine, log)
    reads = [len(span.tokens) for batch in model.batches for span in batch.spans][:2]
    assert reads == [2 * BLOCK_TOKENS + 1, 1]
