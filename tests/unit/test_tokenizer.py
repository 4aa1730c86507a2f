"""Incremental decoding and chat templates."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.manifest import Manifest
from lowbit_server.testing import byte_tokenizer, scripted_model
from lowbit_server.tokenizer import Detokenizer, ModelTokenizer, Tokenizers

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER = byte_tokenizer()
BYTES = TOKENIZER.get_vocab_size()
SPLIT = "\ufffd"


def pieces(tokenizer: Tokenizer, chunks: list[list[int]]) -> list[str]:
    """Return what each chunk of tokens gives, and the rest."""
    decoder = Detokenizer(tokenizer)
    return [decoder.push(chunk) for chunk in chunks] + [decoder.flush()]


def at_once(tokenizer: Tokenizer, chunks: list[list[int]]) -> str:
    text: str = tokenizer.decode([token for chunk in chunks for token in chunk])
    return text


@given(st.lists(st.lists(st.integers(0, BYTES - 1), max_size=5), max_size=20))
def test_pieces_of_any_bytes_are_what_decoding_at_once_gives(chunks: list[list[int]]) -> None:
    assert "".join(pieces(TOKENIZER, chunks)) == at_once(TOKENIZER, chunks)


@given(st.text(max_size=20), st.data())
def test_characters_are_never_split(text: str, data: st.DataObject) -> None:
    ids: list[int] = TOKENIZER.encode(text).ids
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    bounds = [0, *cuts, len(ids)]
    chunks = [ids[a:b] for a, b in pairwise(bounds)]
    found = pieces(TOKENIZER, chunks)
    assert "".join(found) == text
    assert sum(piece.count(SPLIT) for piece in found) == text.count(SPLIT)


@given(st.text(min_size=1, max_size=10), st.integers(1, 3))
def test_only_the_last_piece_can_hold_half_a_character(text: str, missing: int) -> None:
    ids: list[int] = TOKENIZER.encode(text.replace(SPLIT, "?")).ids
    *before, last = pieces(TOKENIZER, [[token] for token in ids[:-missing]])
    assert SPLIT not in "".join(before)
    assert "".join(before) + last == TOKENIZER.decode(ids[:-missing])


def test_special_tokens_are_left_out() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    ids = tokenizer.encode("a<end>b").ids
    assert len(ids) == 3
    assert pieces(tokenizer, [[token] for token in ids]) == ["a", "", "b", ""]


# Templates


def model(folder: Path, template: object = None, **config: object) -> ModelTokenizer:
    scripted_model(folder)
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelTokenizer(folder)


HELLO = [{"role": "user", "content": "hi"}]


def render(tokenizer: ModelTokenizer) -> str:
    return tokenizer.render(HELLO, add_generation_prompt=True)


def test_a_template_sees_messages_and_special_tokens(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ eos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = model(tmp_path, template, bos_token="<s>", eos_token={"content": "</s>"})
    assert render(tokenizer) == "<s></s>hi"


def test_a_template_file_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file")
    assert render(model(tmp_path, "config")) == "file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert render(model(tmp_path, named)) == "plain"


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7]['content'] }}",
        "{% for %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'x' * 10**18 }}",
        "{{ 'x' * 20000000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ 5.nothing() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_the_chats_fault(
    tmp_path: Path, template: str | None
) -> None:
    tokenizer = model(tmp_path, template)
    with pytest.raises(LowbitError) as caught:
        render(tokenizer)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert [one.field for one in caught.value.violations] == ["chat"]


# The cache


def manifest(revision: str) -> Manifest:
    return Manifest.model_construct(name="model", revision=revision)


async def test_a_tokenizer_is_read_once(tmp_path: Path) -> None:
    tokenizers = Tokenizers()
    folder = scripted_model(tmp_path / "model")
    first = await tokenizers.get(manifest("1"), folder)
    (folder / "tokenizer.json").unlink()
    assert await tokenizers.get(manifest("1"), folder) is first


async def test_a_tokenizer_that_cannot_be_read_is_tried_again(tmp_path: Path) -> None:
    tokenizers = Tokenizers()
    with pytest.raises(LowbitError) as caught:
        await tokenizers.get(manifest("1"), tmp_path / "model")
    assert caught.value.reason is Reason.ARTIFACT_CORRUPT
    scripted_model(tmp_path / "model")
    assert (await tokenizers.get(manifest("1"), tmp_path / "model")).encode(
        "ab", add_special_tokens=True
    )


def test_the_front_reads_tokenizers_without_torch_or_transformers() -> None:
    code = "import sys, lowbit_server.server; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "set()\n"
