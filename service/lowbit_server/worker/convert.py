"""Between messages of the protocol and the engine's dataclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.v1.generation_pb2 import FinishReason, Token, TopLogprob
from lowbit.worker.v1 import worker_pb2 as pb
from lowbit_server.engine.request import Request, Sampling
from lowbit_server.grammar.spec import grammar_of
from lowbit_server.worker.inbox import Submission

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lowbit_server.engine.request import Output, TokenLogprob
    from lowbit_server.worker.inbox import Command


def command(message: pb.AttachRequest, now: float) -> Submission | Command | None:
    """Return the command that arrived at `now`; None for one of a newer front."""
    match message.WhichOneof("command"):
        case "submit":
            return submission(message.submit, now)
        case "cancel":
            return message.cancel
        case "load":
            return message.load
        case "unload":
            return message.unload
        case "ping":
            return message.ping
        case "warm_up":
            return message.warm_up
        case _:
            return None


def submission(message: pb.Submit, now: float) -> Submission:
    """Return the request that arrived at `now`, seconds of the monotonic clock."""
    limit_s = message.time_limit_ms / 1e3 if message.time_limit_ms else float("inf")
    request = Request(
        id=message.request,
        prompt=tuple(message.prompt),
        max_tokens=message.max_tokens,
        sampling=Sampling(
            temperature=message.temperature,
            top_p=message.top_p,
            top_k=message.top_k,
            min_p=message.min_p,
            repetition_penalty=message.repetition_penalty,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            seed=message.seed,
            typical_p=message.typical_p,
            logit_bias=tuple((one.token_id, one.bias) for one in message.logit_bias),
            bad_words=tuple(tuple(word.ids) for word in message.bad_words),
        ),
        min_tokens=message.min_tokens,
        eos_token_ids=frozenset(message.eos_token_ids),
        stop_token_ids=frozenset(message.stop_token_ids),
        submitted_at=now,
        ends_by=now + limit_s,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs,
        n=message.n,
        continuations=tuple(tuple(one.ids) for one in message.continuations),
        deterministic=message.deterministic,
        prompt_lookup_tokens=message.prompt_lookup_tokens,
        cache_salt=message.cache_salt,
    )
    return Submission(message.model, request, grammar_of(message.constraint))


def step(outputs: Iterable[Output], running: int, waiting: int) -> pb.AttachResponse:
    """Return the one message of an engine step."""
    return pb.AttachResponse(
        step=pb.Step(
            outputs=[
                pb.Output(
                    request=output.request,
                    token_ids=output.token_ids,
                    finish=FinishReason.ValueType(output.finish or 0),
                    queue_us=output.queue_us,
                    error=output.error,
                    # Most ask for none, and then it costs nothing.
                    logprobs=_tokens(output.token_ids, output.logprobs)
                    if output.logprobs
                    else None,
                    prompt_logprobs=_tokens((), output.prompt_logprobs)
                    if output.prompt_logprobs
                    else None,
                    index=output.index,
                    greedy=output.greedy,
                    cached_tokens=output.cached_tokens,
                    refused=output.refused,
                )
                for output in outputs
            ],
            running=running,
            waiting=waiting,
        )
    )


def _tokens(ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> Iterator[Token]:
    """Return one message a log-probability; without ids where the front knows them."""
    for token, found in zip(ids or (0,) * len(logprobs), logprobs, strict=True):
        top = zip(found.top_ids, found.top_logprobs, strict=True)
        likeliest = [TopLogprob(token_id=one, logprob=logprob) for one, logprob in top]
        yield Token(id=token, logprob=found.logprob, top=likeliest)
