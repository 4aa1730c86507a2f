"""The steps of benchmarks/quantize.py that need torch: samples and quality.

HOME draw SPEC writes HOME/samples.json; HOME measure NAME ... writes HOME/quality.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM

from lowbit_server.jobs.evaluating import cut_text
from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec
from lowbit_server.quant.calibration import draw
from lowbit_server.quant.evaluation import Divergence
from lowbit_server.quant.text import evaluation_text
from tests.models.quantkit import dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

HELD_OUT = EvaluationSpec(max_tokens=20480, window_tokens=512)


def logits(model: torch.nn.Module, windows: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return what predicts each window's tokens but the first, bf16 (tokens, vocabulary)."""
    with torch.inference_mode():
        return [model(torch.tensor([window[:-1]])).logits[0] for window in windows]


def main() -> None:
    """Do one step."""
    home, step, *arguments = sys.argv[1:]
    base = Path(home, "base")
    if step == "draw":
        spec = CalibrationSpec.model_validate_json(arguments[0])
        ids = draw(spec, base, spec.sequence_tokens).ids
        Path(home, "samples.json").write_text(json.dumps(ids.tolist()))
        return
    windows = cut_text(evaluation_text(HELD_OUT), base, HELD_OUT).ids
    expected = logits(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), windows)
    quality = []
    for name in arguments:
        model = dense(base, Path(home, name), torch.bfloat16)
        divergence = Divergence()
        for window, said in zip(windows, expected, strict=True):
            divergence.add(said, logits(model, [window])[0], window[1:])
        quality.append(divergence.figures())
    Path(home, "quality.json").write_text(json.dumps(quality))


if __name__ == "__main__":
    main()
