"""Turns what a worker makes into the events of one Generate stream."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import structlog

from lowbit.v1 import generation_pb2 as pb
from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.worker.v1.worker_pb2 import Output
    from lowbit_server.rpc.context import Context
    from lowbit_server.rpc.output import OutputText
    from lowbit_server.scheduler import Run
    from lowbit_server.store.manifest import Manifest

# With a hundred alternatives each, an event of them takes some 250 kB.
ECHO_TOKENS = 256
"""Tokens of the prompt in one event."""


class Sender:
    """Sends the outputs of one request."""

    def __init__(  # noqa: PLR0913 - the facts of one request
        self,
        request: pb.GenerateRequest,
        context: Context,
        manifest: Manifest,
        run: Run,
        prompt: Sequence[int],
        arrived: float,
    ) -> None:
        """Send to `context`; `arrived` is when the request came, monotonic clock."""
        self._request = request
        self._context = context
        self._manifest = manifest
        self._run = run
        self._prompt = prompt
        self._prompt_logprobs: list[pb.Token] = []
        self._arrived = arrived
        self._submitted = time.monotonic()
        self._cached_tokens = 0
        self._sequence = 0

    async def send(self, texts: Sequence[OutputText]) -> None:
        """Send events until all outputs, a text each, have ended."""
        first, queue_s = 0.0, 0.0
        going = dict(enumerate(texts))
        while going:
            for output in await self._run.stream.take():
                if output.error:
                    raise engine_error(output)
                if output.prompt_logprobs:
                    self._prompt_logprobs += output.prompt_logprobs
                    continue
                if not first:
                    first = time.monotonic()
                    queue_s = self._submitted - self._arrived + output.queue_us / 1e6
                    self._cached_tokens = output.cached_tokens
                    await self._begin(output, texts)
                text = going.get(output.index)
                if text is not None and await self._write_output(output, text):
                    del going[output.index]
                    if not output.finish and going:
                        self._run.cancel_output(output.index)
        await self._write(completed=self._completed(texts, queue_s, first))

    async def _begin(self, output: Output, texts: Sequence[OutputText]) -> None:
        """Send Started, and the prompt before each output when it shall be echoed."""
        if output.finish == pb.FINISH_REASON_CONTEXT_LIMIT and not output.token_ids:
            raise _no_room(len(self._prompt), len(texts))
        await self._write(started=self._started())
        if self._request.output.echo:
            for index, text in enumerate(texts):
                await self._echo(index, text)

    async def _echo(self, index: int, text: OutputText) -> None:
        asked = self._request.output
        tokens: list[pb.Token] = []
        if asked.token_ids or asked.HasField("logprobs"):
            tokens = [pb.Token(id=token) for token in self._prompt]
        for token, found in zip(tokens[1:], self._prompt_logprobs, strict=False):
            token.MergeFrom(found)
        for start in range(0, len(self._prompt), ECHO_TOKENS):
            part = slice(start, start + ECHO_TOKENS)
            new = text.echo(self._prompt[part])
            await self._write(delta=pb.Delta(output_index=index, text=new, tokens=tokens[part]))

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
        tokens = self._tokens(output, text.tokens - before)
        if new or tokens:
            await self._write(delta=pb.Delta(output_index=output.index, text=new, tokens=tokens))
        if finish:
            ended = pb.OutputFinished(
                output_index=output.index, reason=finish, stop_string=text.matched
            )
            if finish == pb.FINISH_REASON_STOP and not text.matched:
                ended.stop_token_id = ids[-1]
            await self._write(output_finished=ended)
        return bool(finish)

    def _tokens(self, output: Output, used: int) -> Sequence[pb.Token]:
        """Return what is reported of the first `used` tokens."""
        if self._request.output.HasField("logprobs"):
            return output.logprobs[:used]
        if self._request.output.token_ids:
            return [pb.Token(id=token) for token in output.token_ids[:used]]
        return ()

    async def _write(self, **event: Any) -> None:
        await self._context.write(pb.GenerateResponse(sequence=self._sequence, **event))
        self._sequence += 1

    def _started(self) -> pb.Started:
        return pb.Started(
            request_id=self._request.request_id
            or structlog.contextvars.get_contextvars().get("request_id", ""),
            model=self._manifest.name,
            model_revision=self._manifest.revision,
            device=self._run.replica.device,
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached_tokens,
        )

    def _completed(self, texts: Sequence[OutputText], queue_s: float, first: float) -> pb.Completed:
        timings = pb.Timings()
        timings.queue.FromMicroseconds(round(queue_s * 1e6))
        timings.time_to_first_token.FromMicroseconds(round((first - self._arrived) * 1e6))
        timings.decode.FromMicroseconds(round((time.monotonic() - first) * 1e6))
        structlog.contextvars.bind_contextvars(
            queue_ms=round(queue_s * 1e3, 1), ttft_ms=round((first - self._arrived) * 1e3, 1)
        )
        tokens = sum(text.tokens for text in texts)
        usage = pb.Usage(
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached_tokens,
            output_tokens=tokens,
        )
        return pb.Completed(usage=usage, timings=timings)


def engine_error(output: Output) -> LowbitError:
    """Return the error of an output that has one.

    Only a constraint can turn out to be impossible after the request was checked.
    """
    if output.refused:
        return invalid("constraint", output.error)
    return LowbitError(Reason.INTERNAL, f"the engine failed for this request: {output.error}")


def _no_room(prompt_tokens: int, outputs: int) -> LowbitError:
    message = (
        f"the prompt has {prompt_tokens} tokens, and the KV memory does not hold it "
        f"{outputs} times with room for output"
    )
    metadata = {"prompt_tokens": str(prompt_tokens)}
    return LowbitError(Reason.CONTEXT_LENGTH_EXCEEDED, message, metadata=metadata)
