"""Prompts and token ids of a request, checked against its model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lowbit.v1 import generation_pb2 as pb
from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.store.manifest import Manifest
    from lowbit_server.tokenizer import ModelTokenizer

INLINE_CHARACTERS = 2048
"""A text up to this long is tokenized in less time than a thread takes to answer."""
MAX_SCORED_TOKENS = 1 << 20
"""Tokens of all continuations of a request: what the worker's largest command holds."""
_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}


async def prompt(
    request: pb.GenerateRequest | pb.ScoreRequest,
    manifest: Manifest,
    tokenizer: ModelTokenizer,
    context_tokens: int,
) -> Sequence[int]:
    """Return the prompt's token ids; raise when they leave no room for one more."""
    ids: Sequence[int]
    if request.HasField("token_ids"):
        ids = request.token_ids.ids
        check_ids("token_ids.ids", ids, manifest.vocab_size)
    elif isinstance(request, pb.GenerateRequest) and request.HasField("chat"):
        ids = await encode(tokenizer, await render(tokenizer, request.chat), special=False)
    else:
        ids = await encode(tokenizer, request.text, special=True)
    if not ids:
        raise invalid("text", "the prompt has no tokens; send at least one")
    if len(ids) >= context_tokens:
        message = (
            f"the prompt has {len(ids)} tokens and the context {context_tokens}; "
            "at least one must be left for the output"
        )
        raise _too_long(message, len(ids), context_tokens)
    return ids


async def render(tokenizer: ModelTokenizer, chat: pb.Chat) -> str:
    """Return a chat as the model's template writes it; raise INVALID_FIELD."""
    messages = [{"role": _ROLES[one.role], "content": one.content} for one in chat.messages]
    opened = not chat.HasField("add_generation_prompt") or chat.add_generation_prompt
    return await asyncio.to_thread(tokenizer.render, messages, add_generation_prompt=opened)


async def encode(tokenizer: ModelTokenizer, text: str, *, special: bool) -> list[int]:
    """Return the token ids of a text, with or without the tokenizer's special tokens."""
    if len(text) <= INLINE_CHARACTERS:
        return tokenizer.encode(text, add_special_tokens=special)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise INVALID_FIELD for token ids that the model does not have."""
    if ids and max(ids) >= vocab_size:
        raise invalid(field, f"token ids of this model are 0 to {vocab_size - 1}, not {max(ids)}")


def check_choices(request: pb.GenerateRequest, manifest: Manifest) -> None:
    """Raise INVALID_FIELD for bad token ids of stops, bias and bad words."""
    size, sampling = manifest.vocab_size, request.sampling
    check_ids("stopping.token_ids", request.stopping.token_ids, size)
    check_ids("sampling.logit_bias", [one.token_id for one in sampling.logit_bias], size)
    check_ids("sampling.bad_words", [id_ for word in sampling.bad_words for id_ in word.ids], size)
    last = {word.ids[-1] for word in sampling.bad_words}
    if last and len(last | {*request.stopping.token_ids, *manifest.eos_token_ids}) >= size:
        raise invalid("sampling.bad_words", "they leave no token that could be generated")


def check_continuations(
    request: pb.ScoreRequest, manifest: Manifest, prompt_tokens: int, context_tokens: int
) -> None:
    """Raise INVALID_FIELD for bad token ids, CONTEXT_LENGTH_EXCEEDED for too many."""
    lengths = [len(one.ids) for one in request.continuations]
    if sum(lengths) > MAX_SCORED_TOKENS:
        message = f"all together have {sum(lengths)} tokens; at most {MAX_SCORED_TOKENS} are scored"
        raise invalid("continuations", message)
    for index, (one, length) in enumerate(zip(request.continuations, lengths, strict=True)):
        check_ids(f"continuations[{index}].ids", one.ids, manifest.vocab_size)
        if prompt_tokens + length > context_tokens:
            message = (
                f"the prompt has {prompt_tokens} tokens, continuation {index} {length} "
                f"and the context {context_tokens}"
            )
            raise _too_long(message, prompt_tokens, context_tokens)


def _too_long(message: str, prompt_tokens: int, context_tokens: int) -> LowbitError:
    metadata = {"prompt_tokens": str(prompt_tokens), "context_tokens": str(context_tokens)}
    return LowbitError(Reason.CONTEXT_LENGTH_EXCEEDED, message, metadata=metadata)
