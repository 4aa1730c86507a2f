"""Verbs of GenerationService."""

# gRPC keeps the deadline, over all tries of a call.
# ruff: noqa: ASYNC109

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.messages import chat, constraint, duration, exactly_one, set_text, strings
from lowbit.v1.generation_pb2 import (
    DetokenizeRequest,
    GenerateRequest,
    LogitBias,
    OutputOptions,
    Sampling,
    ScoreRequest,
    ScoreResponse,
    Stopping,
    TokenIds,
    TokenizeRequest,
    TokenizeResponse,
    TokenSequence,
)
from lowbit.v1.generation_pb2_grpc import GenerationServiceStub

from .stream import AsyncGenerateStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lowbit.messages import Message

    from .transport import AsyncTransport


class AsyncGeneration:
    """Turns prompts into tokens with a loaded model."""

    def __init__(self, transport: AsyncTransport) -> None:
        """Use the transport's channel."""
        self._transport = transport
        self._stub = GenerationServiceStub(transport.channel)

    def generate(  # noqa: PLR0913 - the field's standard options, all by keyword
        self,
        model: str,
        prompt: str | None = None,
        *,
        messages: Iterable[Message] | None = None,
        token_ids: Iterable[int] | None = None,
        max_tokens: int | None = None,
        min_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        typical_p: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        bad_words: Iterable[Iterable[int]] = (),
        seed: int | None = None,
        n: int | None = None,
        stop: str | Iterable[str] = (),
        stop_token_ids: Iterable[int] = (),
        ignore_eos: bool | None = None,
        time_limit: float | None = None,
        json_schema: Mapping[str, object] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: Iterable[str] | None = None,
        token_ids_output: bool | None = None,
        logprobs: int | None = None,
        echo: bool | None = None,
        deterministic: bool | None = None,
        prompt_lookup_tokens: int | None = None,
        cache_salt: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> AsyncGenerateStream:
        """Start a generation and return its stream at once; the call is already under way.

        What is None keeps the server's default.

        Args:
            model: name or alias of a loaded model.
            prompt: plain text. Give exactly one of prompt, messages and token_ids.
            messages: a chat: (role, content), {"role", "content"} or ChatMessage each.
            token_ids: token ids, used as they are.
            max_tokens: at most this many new tokens.
            min_tokens: no end and no stop before this many new tokens.
            temperature: softmax temperature; 0 is greedy.
            top_p: keeps the smallest set of tokens whose probability reaches this.
            top_k: keeps this many of the likeliest tokens; 0 is off.
            min_p: keeps tokens at least this fraction as likely as the likeliest one.
            repetition_penalty: above 1 makes tokens of prompt and output less likely.
            presence_penalty: taken once from the logit of each token of the output.
            frequency_penalty: taken from a token's logit for each time it was seen.
            typical_p: keeps the most typical tokens whose probability reaches this.
            logit_bias: what is added to the logits of tokens, by their ids.
            bad_words: sequences of token ids, the last of which never follows the others.
            seed: makes sampling reproducible.
            n: number of outputs; `Chunk.output_index` says which one a chunk belongs to.
            stop: ends the output when one of these strings appears; it is not emitted.
            stop_token_ids: ends the output when one of these is generated.
            ignore_eos: goes on past the model's own end tokens.
            time_limit: seconds after which the output ends well, with TIME_LIMIT.
            json_schema: the output is JSON that this schema, as text or as what it parses to,
                describes. Give at most one of json_schema, regex, grammar and choice.
            regex: the whole output matches this regular expression (Rust's syntax).
            grammar: the output is what `start` of these Lark rules derives.
            choice: the output is one of these strings.
            token_ids_output: fills `Chunk.token_ids`.
            logprobs: fills `Chunk.logprobs`, and `Chunk.top_logprobs` with this many tokens.
            echo: emits the prompt before the output.
            deterministic: computes each output by itself: greedy tokens are the same, bit for
                bit, whatever else runs. Slower; uses no cached prompt and no drafts.
            prompt_lookup_tokens: drafts up to this many tokens a step, at most 16, from what
                followed the same words before; 0 is off. Changes how fast, never what.
            cache_salt: prompts find their beginnings in the KV cache only where the same salt,
                under the same bearer token, put them.
            request_id: name of the request in the server's log.
            timeout: seconds after which the call fails with DeadlineExceededError.

        Raises:
            ValueError: when there is not exactly one input, more than one constraint, or a
                value fits no field.
                What the server refuses is raised by the stream.

        """
        exactly_one(prompt=prompt, messages=messages, token_ids=token_ids)
        request = GenerateRequest(
            model=model,
            token_ids=None if token_ids is None else TokenIds(ids=token_ids),
            chat=chat(messages),
            sampling=Sampling(
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                typical_p=typical_p,
                logit_bias=[
                    LogitBias(token_id=token, bias=bias)
                    for token, bias in (logit_bias or {}).items()
                ],
                bad_words=[TokenSequence(ids=ids) for ids in bad_words],
                seed=seed,
                n=n,
            ),
            stopping=Stopping(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                strings=strings(stop),
                token_ids=stop_token_ids,
                ignore_eos=ignore_eos,
                time_limit=duration(time_limit),
            ),
            constraint=constraint(
                json_schema=json_schema, regex=regex, grammar=grammar, choice=choice
            ),
            output=OutputOptions(token_ids=token_ids_output, logprobs=logprobs, echo=echo),
            deterministic=deterministic,
            prompt_lookup_tokens=prompt_lookup_tokens,
            cache_salt=cache_salt,
            request_id=request_id,
        )
        set_text(request, prompt)
        timeout = self._transport.options.stream_timeout_s if timeout is None else timeout
        return AsyncGenerateStream(self._transport.open(self._stub.Generate, request, timeout))

    async def tokenize(
        self,
        model: str,
        text: str | None = None,
        *,
        messages: Iterable[Message] | None = None,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> TokenizeResponse:
        """Return the token ids of text or of a chat, as `generate` would make them.

        Raises:
            ValueError: when there is not exactly one of text and messages.
            LowbitError: when the call failed.

        """
        exactly_one(text=text, messages=messages)
        request = TokenizeRequest(
            model=model, chat=chat(messages), add_special_tokens=add_special_tokens
        )
        set_text(request, text)
        return await self._transport.call(
            self._stub.Tokenize, request, timeout_s=timeout, repeatable=True
        )

    async def detokenize(
        self,
        model: str,
        token_ids: Iterable[int],
        *,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """Return the text of token ids; raise LowbitError when the call failed."""
        request = DetokenizeRequest(
            model=model, token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        response = await self._transport.call(
            self._stub.Detokenize, request, timeout_s=timeout, repeatable=True
        )
        return response.text

    async def score(  # noqa: PLR0913 - all but two by keyword
        self,
        model: str,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        continuations: Iterable[Iterable[int]],
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> ScoreResponse:
        """Return the log-probabilities (natural) of continuations, given as token ids.

        `cache_salt` is that of `generate`.

        Raises:
            ValueError: when there is not exactly one of prompt and token_ids.
            LowbitError: when the call failed.

        """
        exactly_one(prompt=prompt, token_ids=token_ids)
        request = ScoreRequest(
            model=model,
            token_ids=None if token_ids is None else TokenIds(ids=token_ids),
            continuations=[TokenIds(ids=ids) for ids in continuations],
            cache_salt=cache_salt,
        )
        set_text(request, prompt)
        timeout = self._transport.options.slow_call_timeout_s if timeout is None else timeout
        return await self._transport.call(
            self._stub.Score, request, timeout_s=timeout, repeatable=True
        )
