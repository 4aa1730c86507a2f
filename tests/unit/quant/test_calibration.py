"""Samples: what is drawn, that it is always the same, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import CalibrationSpec
from lowbit_server.quant.calibration import draw
from lowbit_server.quant.text import builtin_text
from lowbit_server.testing import byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = 4096
RECORDED_ROWS = ["0140", "0080", "0310", "0010"]
RECORDED_DIGEST = "106cde92790bb2fdbc008463e63661d917118ddc3566c574bb414ea0272ec822"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a tokenizer whose tokens are bytes, and a chat template."""
    folder = tmp_path / "model"
    folder.mkdir()
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def text_of(row: torch.Tensor) -> str:
    return byte_tokenizer().decode(row.tolist(), skip_special_tokens=False)


def test_windows_of_the_builtin_text_do_not_overlap(folder: Path) -> None:
    spec = CalibrationSpec(samples=64, sequence_tokens=32)
    samples = draw(spec, folder, CONTEXT)
    assert (samples.ids.dtype, tuple(samples.ids.shape)) == (torch.int64, (64, 32))
    whole = bytes(byte_tokenizer().encode(builtin_text().calibration).ids)
    starts = sorted(whole.index(bytes(row.tolist())) for row in samples.ids)
    assert all(two - one >= 32 for one, two in pairwise(starts))
    assert starts[-1] > 64 * 32  # chosen among more than are needed


def test_the_choice_is_fixed_for_all_time(folder: Path) -> None:
    """Recorded digests: a change of them would refuse checkpoints and break lineage."""
    text = ("".join(f"{number:04}" for number in range(400)),)
    spec = CalibrationSpec(text_inline=text, samples=4, sequence_tokens=40)
    samples = draw(spec, folder, CONTEXT)
    assert [text_of(row)[:4] for row in samples.ids] == RECORDED_ROWS
    assert samples.digest == RECORDED_DIGEST
    other = draw(spec.model_copy(update={"seed": 1}), folder, CONTEXT)
    assert [text_of(row)[:4] for row in other.ids] != RECORDED_ROWS
    assert other.digest != samples.digest


def test_documents_are_rendered_by_the_chat_template(folder: Path, tmp_path: Path) -> None:
    spec = CalibrationSpec(text_inline=("a", "", "b"), samples=1, sequence_tokens=20)
    samples = draw(spec.model_copy(update={"chat_template": True}), folder, CONTEXT)
    assert samples.text == "<user>a</><user>b</>"
    lines = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "more": 1}]
    lines.write_text(json.dumps({"messages": chat}))
    spec = CalibrationSpec(
        text_path=str(lines),
        text_field="messages",
        chat_template=True,
        samples=1,
        sequence_tokens=23,
    )
    samples = draw(spec, folder, CONTEXT)
    assert text_of(samples.ids[0]) == "<user>q</><assistant>a</>"[:23]
    with pytest.raises(LowbitError) as caught:
        draw(spec.model_copy(update={"chat_template": False}), folder, CONTEXT)
    assert caught.value.violations[0].field == "calibration.chat_template"
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(LowbitError, match="no chat template"):
        draw(spec, folder, CONTEXT)


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (CalibrationSpec(sequence_tokens=CONTEXT + 1), "sequence_tokens", "ends at 4096"),
        (
            CalibrationSpec(text_inline=("x" * 99,), samples=3, sequence_tokens=40),
            "samples",
            "has 2 windows of 40 tokens, 3 were asked for",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    spec: CalibrationSpec, field: str, words: str, folder: Path
) -> None:
    with pytest.raises(LowbitError, match=words) as caught:
        draw(spec, folder, CONTEXT)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.violations[0].field == f"calibration.{field}"


def test_a_large_text_is_not_read_to_its_end(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    rows = [json.dumps({"text": "x" * 1000})] * 2000
    lines.write_text("\n".join([*rows, "not JSON"]))
    spec = CalibrationSpec(text_path=str(lines), text_field="text", samples=8, sequence_tokens=64)
    assert len(draw(spec, folder, CONTEXT).text) < 1_000_000
