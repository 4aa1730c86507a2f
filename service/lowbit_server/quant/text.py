"""The texts that calibrate and that quality is measured on. They never overlap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.quant import hub_text
from lowbit_server.quant.overlap import (
    RUN_LETTERS,
    letters,
    shared_run,
    shared_starts,
    sketched_run,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowbit_server.jobs.spec import EvaluationSpec, TextSpec

Role: TypeAlias = Literal["calibration", "evaluation"]
Chat: TypeAlias = list[dict[str, str]]

PARAGRAPH = "\n\n"
"""What stands between the documents of a text."""
CHARACTERS_PER_TOKEN = 64
"""More than any text of words has; it bounds what is read and tokenized."""
_MAX_FILE_BYTES = 256 * 2**20
# Of data sets, which may be larger: more than any request's tokens need.
_MAX_DATASET_CHARACTERS = 256 * 2**20
# Splits that a data set may have, the best first.
_SPLITS: dict[Role, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("test", "validation", "train"),
}


@dataclass(frozen=True, slots=True)
class SplitText:
    """A text in two parts that share nothing."""

    calibration: str
    evaluation: str


@cache
def builtin_text() -> SplitText:
    """Return the standard library's help topics, split in two.

    The third quarter is held out for evaluation as it is. The topics repeat each other, so
    the rest, which calibrates, loses every paragraph that the held-out part has too, whole
    or in a run of `overlap.RUN_LETTERS`.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415  (465 kB)

    text = PARAGRAPH.join(topics[key] for key in sorted(topics))
    begin, end = (text.index(PARAGRAPH, len(text) * part // 4) for part in (2, 3))
    held_out = text[begin:end].lstrip()
    known = {part.strip() for part in held_out.split(PARAGRAPH)}
    parts = (text[:begin] + text[end:]).split(PARAGRAPH)
    rest = [part for part in parts if part.strip() not in known]
    return SplitText(PARAGRAPH.join(_without_shared(rest, held_out)), held_out)


def _without_shared(parts: list[str], held_out: str) -> list[str]:
    """Return the paragraphs that no shared run touches."""
    other = letters(held_out)
    while True:
        spelled = [letters(part) for part in parts]
        starts = shared_starts("".join(spelled), other)
        if not len(starts):
            return parts
        # Number of the paragraph that each letter is in.
        owners = np.repeat(np.arange(len(parts)), [len(part) for part in spelled])
        touched = {int(n) for at in starts for n in owners[[at, at + RUN_LETTERS - 1]]}
        parts = [part for number, part in enumerate(parts) if number not in touched]


def evaluation_text(spec: EvaluationSpec) -> str:
    """Return the text that a spec names, as far as its tokens can reach.

    Raises LowbitError: SOURCE_NOT_FOUND, SOURCE_CORRUPT, INVALID_FIELD.
    """
    found = []
    left = spec.max_tokens * CHARACTERS_PER_TOKEN
    for document in documents(spec, "evaluation"):
        if not isinstance(document, str):
            message = f"field {spec.text_field!r} holds chat messages, not text"
            raise LowbitError(Reason.SOURCE_CORRUPT, message)
        found.append(document)
        left -= len(document) + len(PARAGRAPH)
        if left <= 0:
            break
    return PARAGRAPH.join(found)


def check_apart(calibration: str, evaluation: str) -> None:
    """Raise INVALID_FIELD, with an example, when two texts overlap (see `overlap`)."""
    if shared := shared_run(calibration, evaluation):
        raise _overlap("calibration.source", shared)


def check_unseen(evaluation: str, remembered: Sequence[int]) -> None:
    """Raise INVALID_FIELD when a text overlaps what a model was calibrated on, by its sketch."""
    if shared := sketched_run(evaluation, remembered):
        raise _overlap("evaluation.source", shared)


def _overlap(field: str, shared: str) -> LowbitError:
    return invalid(
        field,
        "calibration and evaluation text must not overlap; without spaces and "
        f"punctuation, both have: {shared}",
    )


def documents(spec: TextSpec, role: Role) -> Iterator[str | Chat]:
    """Yield the documents of a text: samples, rows or the paragraphs of plain text.

    Raises LowbitError: SOURCE_NOT_FOUND, SOURCE_CORRUPT, INVALID_FIELD.
    """
    if spec.text_inline:
        yield from spec.text_inline
    elif spec.dataset:
        left = _MAX_DATASET_CHARACTERS
        rows = hub_text.rows(spec.dataset, spec.text_field, _SPLITS[role])
        for number, value in enumerate(rows, 1):
            yield _document(value, f"row {number} of {spec.dataset}")
            left -= len(str(value))
            if left < 0:
                return
    elif spec.text_path is not None:
        path = Path(spec.text_path)
        text = _read(path, f"{role}.source.file")
        yield from _lines(path, text, spec.text_field) if spec.text_field else text.split(PARAGRAPH)
    else:
        builtin = builtin_text()
        chosen = builtin.calibration if role == "calibration" else builtin.evaluation
        yield from chosen.split(PARAGRAPH)


def _read(path: Path, field: str) -> str:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise invalid(field, f"has more than {_MAX_FILE_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LowbitError(Reason.SOURCE_NOT_FOUND, f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise LowbitError(Reason.SOURCE_CORRUPT, f"{path} is no UTF-8 text") from error


def _lines(path: Path, text: str, field: str) -> Iterator[str | Chat]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LowbitError(Reason.SOURCE_CORRUPT, f"{place} has no field {field!r}") from error
        yield _document(value, place)


def _document(value: object, place: str) -> str | Chat:
    match value:
        case str():
            return value
        case [_, *_]:
            return [_message(item, place) for item in value]
    raise LowbitError(Reason.SOURCE_CORRUPT, f"{place} holds neither text nor chat messages")


def _message(value: object, place: str) -> dict[str, str]:
    match value:
        case {"role": str(role), "content": str(content)}:
            return {"role": role, "content": content}
    message = f"{place} holds a chat message without role and content"
    raise LowbitError(Reason.SOURCE_CORRUPT, message)
