"""A vocabulary of one token a byte, so that masks can be checked against plain sets of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.grammar.matcher import Vocabulary
from lowbit_server.testing import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

END = 256
SIZE = 260
"""Wider than the vocabulary, as the logits of many models are."""
_STARTS = (*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000))
_TEXT = "".join(map(chr, _STARTS))
TOKENS = dict(zip(_TEXT.encode(), byte_tokenizer().encode(_TEXT).ids, strict=True))
"""The token of each byte that UTF-8 has."""


def write_tokenizer(folder: Path) -> Path:
    """Write the tokenizer: 256 bytes and an end."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.token_to_id("<end>") == END
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_vocabulary(folder: Path) -> Vocabulary:
    """Return what grammars see of it."""
    return Vocabulary(write_tokenizer(folder), SIZE, [END])


def token(text: str) -> int:
    """Return the token of one ASCII character."""
    return TOKENS[ord(text)]
