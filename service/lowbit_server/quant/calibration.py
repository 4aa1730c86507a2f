"""Draws the samples that calibrated methods see.

Imports torch: for job processes only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowbit_server.errors import invalid
from lowbit_server.quant.text import PARAGRAPH, documents
from lowbit_server.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lowbit_server.jobs.spec import CalibrationSpec
    from lowbit_server.quant.text import Chat

# Samples are chosen among this many times as many windows, if the text has them: enough for
# chance, and a bound on what is tokenized of a large corpus.
_CHOICE = 8
# Text is tokenized in pieces of this size, which ends in a break between documents.
_PIECE_CHARACTERS = 1 << 18


@dataclass(frozen=True, slots=True)
class Samples:
    """Calibration samples."""

    ids: torch.Tensor
    """int64 (samples, sequence_tokens)."""
    digest: str
    """SHA-256 over the ids, their shape, the seed and whether a chat template was used."""
    text: str
    """The text that they were drawn from."""


def draw(spec: CalibrationSpec, folder: Path, context_tokens: int) -> Samples:
    """Return samples for the model in a folder: random windows that do not overlap.

    The text is tokenized as a whole, documents joined, without special tokens but those of
    the chat template, which renders each document as a message of the user, and lists of
    messages as they are. Which windows are taken, and in which order, depends on the seed and
    on their number only: not on versions of any library.

    Raises LowbitError: INVALID_FIELD for sequences beyond the model's context, a text that is
    too short or a model without chat template; the reasons of `text.documents`.
    """
    tokens = spec.sequence_tokens
    if tokens > context_tokens:
        raise invalid(
            "calibration.sequence_tokens", f"the model's context ends at {context_tokens}"
        )
    tokenizer = ModelTokenizer(folder)
    ids = torch.empty(0, dtype=torch.int64)
    text = ""
    for piece in _pieces(spec, tokenizer):
        text += piece
        new = torch.tensor(tokenizer.encode(piece, add_special_tokens=False), dtype=torch.int64)
        ids = torch.cat([ids, new])
        if len(ids) >= _CHOICE * spec.samples * tokens:
            break
    windows = len(ids) // tokens
    if windows < spec.samples:
        raise invalid(
            "calibration.samples",
            f"the text has {windows} windows of {tokens} tokens, {spec.samples} were asked for",
        )
    order = sorted(range(windows), key=lambda number: _rank(spec.seed, number))
    chosen = ids[: windows * tokens].view(windows, tokens)[order[: spec.samples]]
    return Samples(chosen, _digest(spec, chosen), text)


def _pieces(spec: CalibrationSpec, tokenizer: ModelTokenizer) -> Iterator[str]:
    """Yield the text as the model sees it, piece by piece."""
    piece = ""
    for document in documents(spec, "calibration"):
        piece += _rendered(document, tokenizer) if spec.chat_template else _plain(document)
        if len(piece) >= _PIECE_CHARACTERS:
            yield piece
            piece = ""
    yield piece


def _rendered(document: str | Chat, tokenizer: ModelTokenizer) -> str:
    if not isinstance(document, str):
        return tokenizer.render(document, add_generation_prompt=False)
    if not document.strip():
        return ""
    message = {"role": "user", "content": document}
    return tokenizer.render([message], add_generation_prompt=False)


def _plain(document: str | Chat) -> str:
    if isinstance(document, str):
        return document + PARAGRAPH
    raise invalid("calibration.chat_template", "the text is chat messages, which need one")


def _rank(seed: int, window: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{window}".encode()).digest()


def _digest(spec: CalibrationSpec, ids: torch.Tensor) -> str:
    made = f"{list(ids.shape)}\0{spec.seed}\0{spec.chat_template}\0".encode()
    return hashlib.sha256(made + ids.numpy().astype("<i8").tobytes()).hexdigest()
