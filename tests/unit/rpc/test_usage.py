"""Tokens of the prompt that came from the KV cache, on their way from the worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from lowbit.v1 import generation_pb2 as pb
from lowbit.worker.v1.worker_pb2 import Output
from lowbit_server.pool.stream import RequestStream
from lowbit_server.rpc.generation import _scores
from lowbit_server.rpc.output import OutputText
from lowbit_server.rpc.sender import Sender

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.tokenizer import Detokenizer


class Letters:
    """A detokenizer of code points; and a context that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[pb.GenerateResponse] = []

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""

    async def write(self, message: pb.GenerateResponse) -> None:
        self.written.append(message)


def buffer(*outputs: Output) -> RequestStream:
    stream = RequestStream(64, lambda: None)
    for output in outputs:
        stream.put(output)
    return stream


async def test_started_and_usage_tell_what_came_from_the_cache() -> None:
    letters = Letters()
    stream = buffer(
        Output(request=1, token_ids=[97], cached_tokens=2),
        Output(request=1, token_ids=[98], finish=pb.FINISH_REASON_MAX_TOKENS),
    )
    run = SimpleNamespace(stream=stream, replica=SimpleNamespace(device="cpu"))
    manifest = SimpleNamespace(name="m", revision="r")
    parts = cast("Any", [letters, manifest, run])
    sender = Sender(pb.GenerateRequest(), *parts, prompt=(1, 2, 3), arrived=0.0)
    await sender.send([OutputText(cast("Detokenizer", letters), (), 0)])
    started, completed = letters.written[0].started, letters.written[-1].completed
    assert (started.prompt_tokens, started.cached_tokens) == (3, 2)
    assert completed.usage == pb.Usage(prompt_tokens=3, cached_tokens=2, output_tokens=2)


async def test_scores_tell_what_came_from_the_cache() -> None:
    last = pb.FINISH_REASON_MAX_TOKENS
    stream = buffer(
        Output(request=1, index=1, cached_tokens=5, greedy=True),
        Output(request=1, index=0, finish=last),
    )
    scores, cached = await _scores(stream, 2)
    assert [one.is_greedy for one in scores] == [False, True]
    assert cached == 5
