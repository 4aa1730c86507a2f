"""Options of a request that the worker's command repeats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lowbit.v1 import generation_pb2 as pb
from lowbit_server.rpc.authentication import cache_salt
from lowbit_server.rpc.convert import submit, submit_score

MANIFEST: Any = SimpleNamespace(name="m", context_tokens=8, eos_token_ids=(2,))


def test_options_reach_the_worker() -> None:
    request = pb.GenerateRequest(deterministic=True, prompt_lookup_tokens=4, cache_salt="s")
    command = submit(request, MANIFEST, (1,))
    assert (command.deterministic, command.prompt_lookup_tokens) == (True, 4)
    assert command.cache_salt == cache_salt("s") != cache_salt("")
    plain = submit(pb.GenerateRequest(), MANIFEST, (1,))
    assert (plain.deterministic, plain.prompt_lookup_tokens) == (False, 0)
    assert plain.cache_salt == cache_salt("")


def test_scores_have_the_salt_of_generations() -> None:
    request = pb.ScoreRequest(continuations=[pb.TokenIds(ids=[1])], cache_salt="s")
    assert submit_score(request, MANIFEST, (1,)).cache_salt == cache_salt("s")
