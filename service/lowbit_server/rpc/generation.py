"""GenerationService: prompts in, tokens out."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from lowbit.v1 import generation_pb2 as pb
from lowbit.v1.generation_pb2_grpc import GenerationServiceServicer
from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.rpc import convert
from lowbit_server.rpc.output import OutputText

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.worker.v1.worker_pb2 import Output
    from lowbit_server.pool.replica import Replica
    from lowbit_server.pool.stream import RequestStream
    from lowbit_server.rpc.context import Context
    from lowbit_server.scheduler import Scheduler
    from lowbit_server.store.catalog import Catalog
    from lowbit_server.store.manifest import Manifest
    from lowbit_server.tokenizer import ModelTokenizer, Tokenizers

RETRY_WORKER_S = 1.0
INLINE_CHARACTERS = 2048
"""A text up to this long is tokenized in less time than a thread takes to answer."""
_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}


class GenerationService(GenerationServiceServicer):
    """Validates, admits, tokenizes, streams."""

    def __init__(self, catalog: Catalog, tokenizers: Tokenizers, scheduler: Scheduler) -> None:
        """Serve the models of `catalog` through `scheduler`."""
        self._catalog = catalog
        self._tokenizers = tokenizers
        self._scheduler = scheduler

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        """Stream one request's output; leaving the method early cancels it."""
        arrived = time.monotonic()
        _refuse_unoffered(request)
        manifest = self._catalog.resolve(request.model)
        with self._scheduler.admit(manifest.name) as admission:
            tokenizer = await self._tokenizers.get(manifest, self._catalog.path(manifest))
            prompt = await self._prompt(request, manifest, tokenizer, admission.context_tokens)
            submit = convert.submit(request, manifest, prompt)
            text = OutputText(
                tokenizer.decoder(), request.stopping.strings, request.stopping.min_tokens
            )
            with self._scheduler.run(admission, submit) as (replica, stream):
                sender = _Sender(request, context, manifest, replica, len(prompt), arrived)
                try:
                    await sender.send(stream, text)
                except LowbitError as error:
                    raise _with_usage(error, len(prompt), text.tokens) from error
                finally:
                    structlog.contextvars.bind_contextvars(
                        prompt_tokens=len(prompt), output_tokens=text.tokens, worker=replica.worker
                    )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        """Return the token ids of text or of a rendered chat."""
        tokenizer = await self._tokenizer(request.model)
        special = not request.HasField("add_special_tokens") or request.add_special_tokens
        if request.WhichOneof("input") == "chat":
            text, special = await asyncio.to_thread(_render, tokenizer, request.chat), False
        else:
            text = request.text
        ids = await _encode(tokenizer, text, special=special)
        return pb.TokenizeResponse(token_ids=ids, text=text)

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: Context,
    ) -> pb.DetokenizeResponse:
        """Return the text of token ids."""
        tokenizer = await self._tokenizer(request.model)
        _check_ids("token_ids", request.token_ids, self._catalog.resolve(request.model).vocab_size)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        text = await asyncio.to_thread(
            tokenizer.decode, request.token_ids, skip_special_tokens=skip
        )
        return pb.DetokenizeResponse(text=text)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Belongs to the engine's next step."""
        raise convert.not_implemented("Score")

    async def _tokenizer(self, name: str) -> ModelTokenizer:
        manifest = self._catalog.resolve(name)
        return await self._tokenizers.get(manifest, self._catalog.path(manifest))

    async def _prompt(
        self,
        request: pb.GenerateRequest,
        manifest: Manifest,
        tokenizer: ModelTokenizer,
        context_tokens: int,
    ) -> Sequence[int]:
        """Return the prompt's token ids; raise when they leave no room for one more."""
        match request.WhichOneof("input"):
            case "token_ids":
                prompt: Sequence[int] = request.token_ids.ids
                _check_ids("token_ids.ids", prompt, manifest.vocab_size)
            case "chat":
                text = await asyncio.to_thread(_render, tokenizer, request.chat)
                prompt = await _encode(tokenizer, text, special=False)
            case _:
                prompt = await _encode(tokenizer, request.text, special=True)
        if not prompt:
            raise invalid("text", "the prompt has no tokens; send at least one")
        if len(prompt) >= context_tokens:
            message = (
                f"the prompt has {len(prompt)} tokens and the context {context_tokens}; "
                "at least one must be left for the output"
            )
            metadata = {
                "prompt_tokens": str(len(prompt)),
                "context_tokens": str(context_tokens),
            }
            raise LowbitError(Reason.CONTEXT_LENGTH_EXCEEDED, message, metadata=metadata)
        _check_ids("stopping.token_ids", request.stopping.token_ids, manifest.vocab_size)
        return prompt


class _Sender:
    """Turns the worker's outputs into the events of one stream."""

    def __init__(  # noqa: PLR0913 - the facts of one request
        self,
        request: pb.GenerateRequest,
        context: Context,
        manifest: Manifest,
        replica: Replica,
        prompt_tokens: int,
        arrived: float,
    ) -> None:
        self._request = request
        self._context = context
        self._manifest = manifest
        self._replica = replica
        self._prompt_tokens = prompt_tokens
        self._arrived = arrived
        self._submitted = time.monotonic()
        self._sequence = 0

    async def send(self, stream: RequestStream, text: OutputText) -> None:
        """Send events until the output ends."""
        outputs = await stream.take()
        first = time.monotonic()
        queue_s = self._submitted - self._arrived + outputs[0].queue_us / 1e6
        await self._write(started=self._started())
        while True:
            for output in outputs:
                if output.error:
                    message = f"the engine failed for this request: {output.error}"
                    raise LowbitError(Reason.INTERNAL, message)
                if await self._write_output(output, text):
                    await self._write(completed=self._completed(text.tokens, queue_s, first))
                    return
            outputs = await stream.take()

    async def _write_output(self, output: Output, text: OutputText) -> bool:
        """Send what a step made; return whether the output has ended."""
        before = text.tokens
        ids = output.token_ids
        # The token that ends an output is used but never shown.
        hidden = bool(ids) and output.finish in (pb.FINISH_REASON_EOS, pb.FINISH_REASON_STOP)
        new = text.push(ids[:-1] if hidden else ids)
        if output.finish and not text.matched:
            text.tokens += hidden
            new += text.flush()
        finish = pb.FINISH_REASON_STOP if text.matched else output.finish
        used = ids[: text.tokens - before]
        tokens = [pb.Token(id=token) for token in used] if self._request.output.token_ids else None
        if new or tokens:
            await self._write(delta=pb.Delta(text=new, tokens=tokens))
        if finish:
            ended = pb.OutputFinished(reason=finish, stop_string=text.matched)
            if finish == pb.FINISH_REASON_STOP and not text.matched:
                ended.stop_token_id = ids[-1]
            await self._write(output_finished=ended)
        return bool(finish)

    async def _write(self, **event: Any) -> None:
        await self._context.write(pb.GenerateResponse(sequence=self._sequence, **event))
        self._sequence += 1

    def _started(self) -> pb.Started:
        return pb.Started(
            request_id=self._request.request_id
            or structlog.contextvars.get_contextvars().get("request_id", ""),
            model=self._manifest.name,
            model_revision=self._manifest.revision,
            device=self._replica.device,
            prompt_tokens=self._prompt_tokens,
        )

    def _completed(self, output_tokens: int, queue_s: float, first: float) -> pb.Completed:
        timings = pb.Timings()
        timings.queue.FromMicroseconds(round(queue_s * 1e6))
        timings.time_to_first_token.FromMicroseconds(round((first - self._arrived) * 1e6))
        timings.decode.FromMicroseconds(round((time.monotonic() - first) * 1e6))
        structlog.contextvars.bind_contextvars(
            queue_ms=round(queue_s * 1e3, 1), ttft_ms=round((first - self._arrived) * 1e3, 1)
        )
        usage = pb.Usage(prompt_tokens=self._prompt_tokens, output_tokens=output_tokens)
        return pb.Completed(usage=usage, timings=timings)


def _refuse_unoffered(request: pb.GenerateRequest) -> None:
    if request.constraint.WhichOneof("kind"):
        raise convert.not_implemented(f"constraint.{request.constraint.WhichOneof('kind')}")
    if request.sampling.n > 1:
        raise convert.not_implemented("sampling.n greater than 1")
    if request.output.HasField("logprobs"):
        raise convert.not_implemented("output.logprobs")
    if request.output.echo:
        raise convert.not_implemented("output.echo")


def _render(tokenizer: ModelTokenizer, chat: pb.Chat) -> str:
    messages = [{"role": _ROLES[one.role], "content": one.content} for one in chat.messages]
    prompt = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
    return tokenizer.render(messages, add_generation_prompt=prompt)


async def _encode(tokenizer: ModelTokenizer, text: str, *, special: bool) -> list[int]:
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=special)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and max(ids) >= vocab_size:
        raise invalid(field, f"token ids of this model are 0 to {vocab_size - 1}, not {max(ids)}")


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
