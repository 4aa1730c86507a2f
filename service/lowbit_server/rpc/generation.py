"""GenerationService: prompts in, tokens out."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

import grpc
import structlog

from lowbit.v1 import generation_pb2 as pb
from lowbit.v1.generation_pb2_grpc import GenerationServiceServicer
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.grammar.spec import grammar_of
from lowbit_server.rpc import convert, prompts
from lowbit_server.rpc.output import OutputText
from lowbit_server.rpc.sender import Sender, engine_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.grammar.checker import GrammarChecker
    from lowbit_server.pool.stream import RequestStream
    from lowbit_server.rpc.context import Context
    from lowbit_server.scheduler import Scheduler
    from lowbit_server.store.catalog import Catalog
    from lowbit_server.store.manifest import Manifest
    from lowbit_server.tokenizer import ModelTokenizer, Tokenizers

RETRY_WORKER_S = 1.0


class GenerationService(GenerationServiceServicer):
    """Validates, admits, tokenizes, streams."""

    def __init__(
        self,
        catalog: Catalog,
        tokenizers: Tokenizers,
        scheduler: Scheduler,
        grammars: GrammarChecker,
    ) -> None:
        """Serve the models of `catalog` through `scheduler`."""
        self._catalog = catalog
        self._tokenizers = tokenizers
        self._scheduler = scheduler
        self._grammars = grammars

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Stream one request's outputs; leaving the method early cancels it."""
        arrived = time.monotonic()
        manifest = self._catalog.resolve(request.model)
        outputs = convert.outputs(request)
        with self._scheduler.admit(manifest.name, outputs) as admission:
            tokenizer = await self._tokenizers.get(manifest, self._catalog.path(manifest))
            limit = admission.context_tokens
            prompt = await prompts.prompt(request, manifest, tokenizer, limit)
            prompts.check_choices(request, manifest)
            await self._check_constraint(request, manifest)
            submit = convert.submit(request, manifest, prompt)
            stopping = request.stopping
            texts = [
                OutputText(tokenizer.decoder(), stopping.strings, stopping.min_tokens)
                for _ in range(outputs)
            ]
            with self._scheduler.run(admission, submit) as run:
                sender = Sender(request, context, manifest, run, prompt, arrived)
                try:
                    await sender.send(texts)
                except LowbitError as error:
                    raise _with_usage(error, len(prompt), _count(texts)) from error
                finally:
                    structlog.contextvars.bind_contextvars(
                        prompt_tokens=len(prompt),
                        output_tokens=_count(texts),
                        worker=run.replica.worker,
                    )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the token ids of text or of a rendered chat."""
        tokenizer = await self._tokenizer(request.model)
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        if request.WhichOneof("input") == "chat":
            text, special = await prompts.render(tokenizer, request.chat), False
        else:
            text = request.text
        ids = await prompts.encode(tokenizer, text, special=special)
        return pb.TokenizeResponse(token_ids=ids, text=text)

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: Context,
    ) -> pb.DetokenizeResponse:
        """Return the text of token ids."""
        tokenizer = await self._tokenizer(request.model)
        size = self._catalog.resolve(request.model).vocab_size
        prompts.check_ids("token_ids", request.token_ids, size)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        text = await asyncio.to_thread(
            tokenizer.decode, request.token_ids, skip_special_tokens=skip
        )
        return pb.DetokenizeResponse(text=text)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Return the log-probabilities of continuations; leaving early cancels the request."""
        manifest = self._catalog.resolve(request.model)
        with self._scheduler.admit(manifest.name) as admission:
            tokenizer = await self._tokenizers.get(manifest, self._catalog.path(manifest))
            limit = admission.context_tokens
            prompt = await prompts.prompt(request, manifest, tokenizer, limit)
            prompts.check_continuations(request, manifest, len(prompt), limit)
            submit = convert.submit_score(request, manifest, prompt)
            with self._scheduler.run(admission, submit) as run:
                tokens = sum(len(one.ids) for one in request.continuations)
                structlog.contextvars.bind_contextvars(
                    prompt_tokens=len(prompt), output_tokens=tokens, worker=run.replica.worker
                )
                try:
                    scores, cached = await _scores(run.stream, len(request.continuations))
                except LowbitError as error:
                    raise _with_usage(error, len(prompt), 0) from error
        usage = pb.Usage(prompt_tokens=len(prompt), cached_tokens=cached, output_tokens=tokens)
        return pb.ScoreResponse(scores=scores, usage=usage)

    async def _check_constraint(self, request: pb.GenerateRequest, manifest: Manifest) -> None:
        """Raise INVALID_FIELD for a constraint that the model cannot follow."""
        grammar = grammar_of(request.constraint)
        if grammar is None:
            return
        if manifest.scheme.kind == "scripted":
            raise convert.not_implemented(f"constraint.{grammar.kind} of a scripted model")
        await self._grammars.check(grammar, manifest, self._catalog.path(manifest))

    async def _tokenizer(self, name: str) -> ModelTokenizer:
        manifest = self._catalog.resolve(name)
        return await self._tokenizers.get(manifest, self._catalog.path(manifest))


async def _scores(stream: RequestStream, count: int) -> tuple[list[pb.ContinuationScore], int]:
    """Collect the scores of `count` continuations; and tokens of the prompt from the cache."""
    scores, cached = [pb.ContinuationScore() for _ in range(count)], 0
    while True:
        for output in await stream.take():
            if output.error:
                raise engine_error(output)
            if output.finish == pb.FINISH_REASON_CANCELLED:
                message = "the model was unloaded"
                raise LowbitError(Reason.MODEL_NOT_LOADED, message)
            cached = max(cached, output.cached_tokens)
            logprobs = [token.logprob for token in output.logprobs]
            scores[output.index] = pb.ContinuationScore(
                token_logprobs=logprobs, logprob=math.fsum(logprobs), is_greedy=output.greedy
            )
            if output.finish:
                return scores, cached


def _count(texts: Sequence[OutputText]) -> int:
    """Return the tokens of all outputs so far."""
    return sum(text.tokens for text in texts)


def _with_usage(error: LowbitError, prompt_tokens: int, output_tokens: int) -> LowbitError:
    """Return the error with what was used; a worker lost after the first token is INTERNAL."""
    metadata = error.metadata | {
        "prompt_tokens": str(prompt_tokens),
        "output_tokens": str(output_tokens),
    }
    code, retry_after_s = error.code, error.retry_after_s
    if error.reason is Reason.WORKER_LOST:
        code = grpc.StatusCode.INTERNAL if output_tokens else code
        retry_after_s = None if output_tokens else RETRY_WORKER_S
    return LowbitError(
        error.reason, error.message, metadata=metadata, retry_after_s=retry_after_s, code=code
    )
