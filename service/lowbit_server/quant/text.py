"""The text that quality is measured on. Calibration and evaluation text never overlap."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from lowbit_server.jobs.spec import EvaluationSpec

_PARAGRAPH = "\n\n"
_MAX_FILE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class SplitText:
    """A text in two halves that share nothing."""

    calibration: str
    evaluation: str


def builtin_text() -> SplitText:
    """Return the standard library's help topics, split into halves.

    The second half is held out for evaluation as it is. The topics repeat each other, so
    the first half, which calibrates, loses every paragraph that the second has too.
    """
    from pydoc_data.topics import topics  # noqa: PLC0415  (465 kB)

    text = _PARAGRAPH.join(topics[key] for key in sorted(topics))
    middle = text.index(_PARAGRAPH, len(text) // 2)
    held_out = text[middle:].split(_PARAGRAPH)
    known = {part.strip() for part in held_out}
    kept = [part for part in text[:middle].split(_PARAGRAPH) if part.strip() not in known]
    return SplitText(_PARAGRAPH.join(kept), _PARAGRAPH.join(held_out).lstrip())


def evaluation_text(spec: EvaluationSpec) -> str:
    """Return the text that a spec names: inline, a file or the built-in one.

    Raises LowbitError: SOURCE_NOT_FOUND, SOURCE_CORRUPT, INVALID_FIELD.
    """
    if spec.text_inline:
        return _PARAGRAPH.join(spec.text_inline)
    if spec.text_path is None:
        return builtin_text().evaluation
    path = Path(spec.text_path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise invalid("evaluation.source.file", f"has more than {_MAX_FILE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LowbitError(Reason.SOURCE_NOT_FOUND, f"there is no file {path}") from error
    except UnicodeDecodeError as error:
        raise LowbitError(Reason.SOURCE_CORRUPT, f"{path} is no UTF-8 text") from error
    return _fields(path, text, spec.text_field) if spec.text_field else text


def _fields(path: Path, text: str, field: str) -> str:
    samples = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            message = f"line {number} of {path} has no field {field!r}"
            raise LowbitError(Reason.SOURCE_CORRUPT, message) from error
        if not isinstance(sample, str):
            message = f"field {field!r} in line {number} of {path} is no text"
            raise LowbitError(Reason.SOURCE_CORRUPT, message)
        samples.append(sample)
    return _PARAGRAPH.join(samples)
