from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import EvaluationSpec
from lowbit_server.quant.text import builtin_text, check_apart, evaluation_text

if TYPE_CHECKING:
    from pathlib import Path


def test_the_parts_of_the_builtin_text_share_nothing() -> None:
    text = builtin_text()
    assert builtin_text() == text
    assert min(len(text.calibration), len(text.evaluation)) > 100_000
    calibration, evaluation = (
        {part.strip() for part in half.split("\n\n")}
        for half in (text.calibration, text.evaluation)
    )
    assert not calibration & evaluation
    check_apart(text.calibration, text.evaluation)
    assert evaluation_text(EvaluationSpec()) == text.evaluation


def test_no_more_text_is_read_than_its_tokens_can_reach() -> None:
    spec = EvaluationSpec(text_inline=("a" * 1000, "b" * 1000, "c" * 1000), max_tokens=16)
    assert evaluation_text(spec) == "a" * 1000 + "\n\n" + "b" * 1000


def test_the_same_text_twice_is_refused() -> None:
    text = builtin_text()
    with pytest.raises(LowbitError, match="both have: ") as caught:
        check_apart(text.calibration, text.calibration[5000:10_000])
    assert caught.value.violations[0].field == "calibration.source"


def test_inline_text_and_files_are_read(tmp_path: Path) -> None:
    assert evaluation_text(EvaluationSpec(text_inline=("a", "b"))) == "a\n\nb"
    plain = tmp_path / "plain.txt"
    plain.write_text("héllo", encoding="utf-8")
    assert evaluation_text(EvaluationSpec(text_path=str(plain))) == "héllo"
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": "b", "more": 1}\n')
    spec = EvaluationSpec(text_path=str(lines), text_field="text")
    assert evaluation_text(spec) == "a\n\nb"
    lines.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(LowbitError, match="chat messages"):
        evaluation_text(EvaluationSpec(text_path=str(lines), text_field="messages"))


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "1", '"text"', "{}", '{"text": 1}', '{"texts": "a"}'),
        *('{"text": []}', '{"text": [{"role": "user"}]}', '{"text": ["a"]}'),
    ],
)
def test_lines_without_the_field_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(LowbitError, match="line 2") as caught:
        evaluation_text(EvaluationSpec(text_path=str(path), text_field="text"))
    assert caught.value.reason is Reason.SOURCE_CORRUPT


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(LowbitError) as caught:
        evaluation_text(EvaluationSpec(text_path=str(path)))
    assert caught.value.reason is Reason.SOURCE_NOT_FOUND
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(LowbitError) as caught:
        evaluation_text(EvaluationSpec(text_path=str(path)))
    assert caught.value.reason is Reason.SOURCE_CORRUPT
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(LowbitError) as caught:
        evaluation_text(EvaluationSpec(text_path=str(path)))
    assert caught.value.reason is Reason.INVALID_FIELD
