from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.kv_cache import BLOCK_TOKENS
from lowbit_server.engine.request import Finish, Output, Request
from lowbit_server.models.decoder import CHUNK_TOKENS
from tests.unit.engine.counting import VOCAB, CountingModel, expected

TOKEN = CountingModel().spec.token_bytes


class Log:
    """All that an engine said, by request."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.ends: dict[int, list[Finish | str]] = defaultdict(list)

    def add(self, outputs: list[Output]) -> None:
        assert len({output.request for output in outputs}) == len(outputs)
        for output in outputs:
            assert not self.ends[output.request], "something came after the end"
            self.tokens[output.request] += output.token_ids
            if output.finish or output.error:
                self.ends[output.request].append(output.finish or output.error)


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


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 30),
        length=st.one_of(st.integers(1, 40), st.integers(400, 1400)),
        max_tokens=st.integers(1, 40),
        cancelled_after=st.one_of(st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(arrivals=arrivals, slots=st.integers(1, 5), blocks=st.integers(2, 12))
def test_every_request_gets_its_own_tokens_and_ends_once(
    arrivals: list[Arrival], slots: int, blocks: int
) -> None:
    model = CountingModel(context_tokens=1200)
    budget_tokens = blocks * BLOCK_TOKENS
    engine = make(model, slots=slots, tokens=budget_tokens)
    context = min(1200, budget_tokens)
    log = Log()
    step = 0
    while step <= 51 or engine.status().due is not None:
        for number, arrival in enumerate(arrivals):
            if arrival.step == step:
                request = Request(number, prompt(number, arrival.length), arrival.max_tokens)
                log.add(engine.submit(request))
            if step - arrival.step == arrival.cancelled_after:
                log.add(engine.cancel(number))
        log.add(engine.step())
        status = engine.status()
        assert status.running <= slots
        assert status.kv_bytes <= budget_tokens * TOKEN
        step += 1
    for number, arrival in enumerate(arrivals):
        tokens, (end,) = log.tokens[number], log.ends[number]
        assert tokens == expected(prompt(number, arrival.length), len(tokens))
        room = max(context - arrival.length, 0)
        if end is Finish.CANCELLED:
            assert arrival.cancelled_after is not None
        elif end is Finish.CONTEXT_LIMIT:
            assert len(tokens) == room <= arrival.max_tokens
        else:
            assert end is Finish.MAX_TOKENS
            assert len(tokens) == arrival.max_tokens < room
    assert engine.status().kv_bytes == 0
    assert engine.status().running == engine.status().waiting == 0


def test_a_long_prompt_comes_in_chunks_beside_running_requests() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    engine.submit(Request(1, prompt(1, 5), 20))
    log.add(engine.step())
    engine.submit(Request(2, prompt(2, 3 * CHUNK_TOKENS - 1), 4))
    for made in (2, 3, 4):
        log.add(engine.step())
        assert len(log.tokens[1]) == made
    assert len(log.tokens[2]) == 1
    widths = [len(batch.tokens[0]) for batch in model.batches if len(batch.tokens[0]) > 5]
    assert widths == [CHUNK_TOKENS, CHUNK_TOKENS, CHUNK_TOKENS - 1]
    run(engine, log)
    assert log.tokens[2] == expected(prompt(2, 3 * CHUNK_TOKENS - 1), 4)


def test_requests_that_run_are_one_batch() -> None:
    model = CountingModel()
    engine, log = make(model), Log()
    for number in range(4):
        engine.submit(Request(number, prompt(number, 3), 10))
    run(engine, log)
    assert max(len(batch.tokens) for batch in model.batches) == 4
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
    model.fails = {len(model.batches) + 1}  # the decode of 1 comes first, then 2's prompt
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
