"""Text to token ids and back, without torch or transformers."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jinja2 import Template
    from jinja2.runtime import Context

    from lowbit_server.store.manifest import Manifest

CACHED_TOKENIZERS = 16
"""Tokenizers held in memory; each takes some tens of megabytes."""
TEMPLATE_BYTES = 1 << 20
"""Longest chat template that is read."""


def same_vocabulary(one: Path, other: Path) -> bool:
    """Return whether two models' folders give every token the same id."""
    files = [folder / "tokenizer.json" for folder in (one, other)]
    if files[0].read_bytes() == files[1].read_bytes():
        return True
    first, second = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    return bool(first == second)


class ModelTokenizer:
    """The tokenizer and the chat template of one model."""

    def __init__(self, folder: Path) -> None:
        """Read them from a model's folder."""
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        self._special = {
            key: _content(value) for key, value in config.items() if key.endswith("_token")
        }
        self._template = _read_template(folder, config)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """Return a chat as the model's own template writes it; raise INVALID_FIELD.

        The template comes with the model and is not trusted: it runs in jinja2's
        immutable sandbox.
        """
        if not self._template:
            raise invalid("chat", "the model has no chat template; send text or token_ids")
        try:
            return self._compiled.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._special
            )
        except Exception as error:  # foreign code raises what it likes
            raise invalid("chat", f"the model's chat template refuses it: {error}") from error

    @cached_property
    def _compiled(self) -> Template:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now)
        return environment.from_string(self._template)

    def decoder(self) -> Detokenizer:
        """Return a new incremental detokenizer."""
        return Detokenizer(self._tokenizer)


class Detokenizer:
    """Turns the tokens of one output into text as they come.

    What `push` and `flush` return, put together, is what decoding all tokens at once
    would give. Never emits half a character: bytes wait until the character is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Begin an output."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that has become certain with these tokens; may be empty."""
        self._ids += ids
        text = "".join(self._stream.step(self._tokenizer, token) or "" for token in ids)
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        """Return what is left at the end of the output; broken bytes become U+FFFD."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[self._emitted :]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which one operator cannot ask for all memory either."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """Refuse powers and products of anything but two numbers."""
        if operator == "**" or not all(isinstance(one, (int, float)) for one in (left, right)):
            message = f"'{operator}' is only offered for the product of two numbers"
            raise TemplateError(message)
        return super().call_binop(context, operator, left, right)


class Tokenizers:
    """Reads tokenizers on first use and keeps the most recently used ones."""

    def __init__(self) -> None:
        """Hold none yet."""
        self._cache: OrderedDict[str, ModelTokenizer] = OrderedDict()
        self._reading = asyncio.Lock()

    async def get(self, manifest: Manifest, folder: Path) -> ModelTokenizer:
        """Return the tokenizer of a model; raise ARTIFACT_CORRUPT when it cannot be read."""
        key = manifest.revision
        if key not in self._cache:
            async with self._reading:  # of many first requests one reads
                if key not in self._cache:
                    self._cache[key] = await _read(manifest.name, folder)
                    if len(self._cache) > CACHED_TOKENIZERS:
                        self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]


async def _read(name: str, folder: Path) -> ModelTokenizer:
    try:
        return await asyncio.to_thread(ModelTokenizer, folder)
    except Exception as error:  # the tokenizers library raises plain Exception
        message = f"the tokenizer of {name!r} cannot be read: {error}"
        raise LowbitError(Reason.ARTIFACT_CORRUPT, message) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    loaded = json.loads(path.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _content(token: object) -> object:
    """Return a special token's text; older files hold an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def _read_template(folder: Path, config: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(template, list):  # named templates: the default one
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    if not isinstance(template, str) or len(template) > TEMPLATE_BYTES:
        return ""
    return template


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - templates mean local time


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
