from __future__ import annotations

import pytest

from lowbit_server.engine.finish import finish_reason
from lowbit_server.engine.request import Finish, Request, Running

EOS, STOP = 2, 9


def finish(
    tokens: list[int], *, max_tokens: int = 8, min_tokens: int = 0, now: float = 0.0
) -> Finish | None:
    request = Request(
        id=1,
        prompt=(1, 1, 1),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        eos_token_ids=frozenset({EOS}),
        stop_token_ids=frozenset({STOP}),
        ends_by=10.0,
    )
    running = Running(request, index=0, context_tokens=12, tokens=tokens)
    return finish_reason(running, now)


@pytest.mark.parametrize(
    ("tokens", "fields", "reason"),
    [
        ([5], {}, None),
        ([5, EOS], {}, Finish.EOS),
        ([5, STOP], {}, Finish.STOP),
        ([5] * 7, {}, None),
        ([5] * 8, {}, Finish.MAX_TOKENS),
        ([5] * 9, {"max_tokens": 9}, Finish.CONTEXT_LIMIT),
        ([5], {"now": 10.0}, Finish.TIME_LIMIT),
    ],
)
def test_each_rule(tokens: list[int], fields: dict[str, float], reason: Finish | None) -> None:
    assert finish(tokens, **fields) is reason


def test_an_end_token_says_more_than_a_limit() -> None:
    assert finish([5, EOS], max_tokens=2, now=99.0) is Finish.EOS
    assert finish([5, STOP], max_tokens=2, now=99.0) is Finish.STOP


def test_end_tokens_end_nothing_before_min_tokens() -> None:
    assert finish([EOS] * 3, min_tokens=3) is None
    assert finish([EOS] * 4, min_tokens=3) is Finish.EOS
