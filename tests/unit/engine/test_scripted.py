from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

from lowbit_server.engine import scripted
from lowbit_server.engine.request import Request
from lowbit_server.engine.scripted import Script, ScriptedConfig, ScriptedEngine

if TYPE_CHECKING:
    from collections.abc import Callable

    from lowbit_server.engine.request import Output


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(scripted, "time", clock)
    return clock


@pytest.fixture
def engine() -> Callable[..., ScriptedEngine]:
    def make(slots: int = 64, **script: object) -> ScriptedEngine:
        config = ScriptedConfig(
            model_type="lowbit_scripted",
            architectures=("ScriptedModel",),
            max_position_embeddings=1000,
            vocab_size=100,
            script=Script.model_validate(script),
        )
        return ScriptedEngine(config, slots)

    return make


def request(number: int, max_tokens: int = 5, **fields: Any) -> Request:
    return Request(id=number, max_tokens=max_tokens, **({"prompt": (7,)} | fields))


def step_late(engine: ScriptedEngine, clock: Clock, late_s: float) -> list[Output]:
    due = engine.status().due
    assert due is not None
    clock.now = due + late_s
    return engine.step()


def test_lateness_does_not_add_up(clock: Clock, engine: Callable[..., ScriptedEngine]) -> None:
    player = engine(step_ms=5)
    player.submit(request(1, max_tokens=101))
    for _ in range(100):
        step_late(player, clock, late_s=0.002)
    assert player.status().due == pytest.approx(100.5)


def test_the_clock_starts_anew_after_an_idle_time(
    clock: Clock, engine: Callable[..., ScriptedEngine]
) -> None:
    player = engine(step_ms=5)
    player.submit(request(1, max_tokens=1))
    step_late(player, clock, late_s=0)
    assert player.status().due is None
    clock.now = 500.0
    player.submit(request(2))
    assert player.status().due == 500.0


def test_prefill_delays_the_first_token(
    clock: Clock, engine: Callable[..., ScriptedEngine]
) -> None:
    player = engine(step_ms=5, prefill_ms=12)
    player.submit(request(1))
    made = [len(step_late(player, clock, late_s=0)) for _ in range(5)]
    assert made == [0, 0, 0, 1, 1]


def test_a_first_token_waits_for_no_step(
    clock: Clock, engine: Callable[..., ScriptedEngine]
) -> None:
    player = engine(step_ms=5)
    player.submit(request(1))
    step_late(player, clock, late_s=0)
    clock.now += 0.003
    player.submit(request(2))
    (first,) = step_late(player, clock, late_s=0)
    assert (first.request, clock.now) == (2, pytest.approx(100.003))
    assert [one.request for one in step_late(player, clock, late_s=0)] == [1, 2]
    assert clock.now == pytest.approx(100.005)


@pytest.mark.parametrize(("slots", "wanted", "running"), [(2, 64, 2), (64, 3, 3)])
def test_the_fewer_slots_count(
    clock: Clock, engine: Callable[..., ScriptedEngine], slots: int, wanted: int, running: int
) -> None:
    player = engine(slots, max_running=wanted)
    for number in range(4):
        player.submit(request(number))
    step_late(player, clock, late_s=0)
    assert (player.status().running, player.status().waiting) == (running, 4 - running)


@pytest.mark.parametrize(
    "script",
    [{"step_ms": -1}, {"faults": [{"kind": "explode"}]}, {"faults": [{}]}, {"speed": 1}],
)
def test_a_bad_script_is_refused(script: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Script.model_validate(script)


def test_its_distribution_is_one(clock: Clock, engine: Callable[..., ScriptedEngine]) -> None:
    player = engine(tokens=[20, 30])
    player.submit(request(1, max_tokens=1, logprobs=100))
    (output,) = step_late(player, clock, late_s=0)
    (found,) = output.logprobs
    assert output.token_ids == found.top_ids[:1] == (20,)
    assert found.logprob == found.top_logprobs[0] == -math.log(2)
    assert sorted(found.top_ids) == list(range(100))
    assert sum(map(math.exp, found.top_logprobs)) == pytest.approx(1)


def test_it_scores_against_its_script(clock: Clock, engine: Callable[..., ScriptedEngine]) -> None:
    player = engine(tokens=[20, 30])
    player.submit(request(1, continuations=((20, 30, 20), (20, 31), (19,))))
    outputs = step_late(player, clock, late_s=0)
    assert player.status().due is None
    found = [[one.logprob / -math.log(2) for one in output.logprobs] for output in outputs]
    assert found == [pytest.approx([1, 1, 1]), pytest.approx([1, 2]), pytest.approx([100])]
    assert [output.greedy for output in outputs] == [True, False, False]
    assert [bool(output.finish) for output in outputs] == [False, False, True]


def test_outputs_begin_one_token_apart(clock: Clock, engine: Callable[..., ScriptedEngine]) -> None:
    player = engine(tokens=[20, 30, 40])
    player.submit(request(1, max_tokens=2, n=3, prompt=(5, 6), logprobs=0, prompt_logprobs=True))
    outputs = [*step_late(player, clock, late_s=0), *step_late(player, clock, late_s=0)]
    made = {index: [] for index in range(3)}
    for output in outputs:
        made[output.index] += output.token_ids
    assert made == {0: [20, 30], 1: [30, 40], 2: [40, 20]}
    (prompted,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    assert [one.logprob for one in prompted] == [pytest.approx(-math.log(2) * (1 + (6 - 30) % 100))]
