"""Fields of a request and of an output that cross to the engine and back."""

from __future__ import annotations

from lowbit.worker.v1 import worker_pb2 as pb
from lowbit_server.engine.request import Output
from lowbit_server.worker.convert import step, submission


def test_options_of_a_request_reach_the_engine() -> None:
    message = pb.Submit(deterministic=True, prompt_lookup_tokens=4, cache_salt=b"salt")
    request = submission(message, now=1.0).request
    assert (request.deterministic, request.prompt_lookup_tokens) == (True, 4)
    assert request.cache_salt == b"salt"


def test_tokens_from_the_cache_reach_the_front() -> None:
    (output,) = step([Output(1, (7,), cached_tokens=5)], running=1, waiting=0).step.outputs
    assert output.cached_tokens == 5
