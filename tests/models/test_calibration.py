"""Calibration from the job's spec to the manifest, on tiny random models and a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.evaluating import evaluate_model
from lowbit_server.jobs.spec import CalibrationSpec, EvaluateSpec, EvaluationSpec, Measured
from lowbit_server.quant.calibration import draw
from lowbit_server.quant.schemes import RtnScheme
from tests.models.quantkit import FAMILIES, Store, random_source

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATION = CalibrationSpec(samples=4, sequence_tokens=32)
EVALUATION = EvaluationSpec(max_tokens=128, window_tokens=64)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    return store


def test_the_digest_of_the_samples_is_recorded(store: Store) -> None:
    base = store.models / "base"
    store.quantized(RtnScheme(), evaluation=EVALUATION, calibration=CALIBRATION)
    manifest = store.manifest("small")
    assert manifest.calibration_digest == draw(CALIBRATION, base, 64).digest
    assert manifest.quality is not None
    assert store.progress[0].phase == "calibrate"
    assert store.manifest("base").calibration_digest == ""


def test_one_text_for_both_is_refused_before_work(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"The number {number} is here. " for number in range(1000)))
    same = {"text_path": str(file)}
    with pytest.raises(LowbitError, match="overlap") as caught:
        store.quantized(
            RtnScheme(),
            evaluation=EVALUATION.model_copy(update=same),
            calibration=CALIBRATION.model_copy(update=same),
        )
    assert caught.value.reason is Reason.INVALID_FIELD
    assert "thenumber" in caught.value.message
    assert not (store.models / "small").exists()


def test_a_model_is_not_measured_on_what_calibrated_it(store: Store) -> None:
    seen = [f"The number {number} is here." for number in range(1000)]
    calibration = CALIBRATION.model_copy(update={"text_inline": tuple(seen)})
    small = store.quantized(RtnScheme(), calibration=calibration)

    def evaluate(model: str, against: str, text: str) -> Measured:
        evaluation = EVALUATION.model_copy(update={"text_inline": (text,)})
        spec = EvaluateSpec(model=model, against=against, device="cpu", evaluation=evaluation)
        return evaluate_model(spec, store._context(model, small))

    for model, against in (("small", "base"), ("base", "small")):
        with pytest.raises(LowbitError, match="overlap") as caught:
            evaluate(model, against, "Something else. " + " ".join(seen[500:520]))
        assert caught.value.violations[0].field == "evaluation.source"
    unseen = evaluate("small", "base", "Nobody has read these words before. " * 9)
    assert unseen.quality.tokens > 0


def test_the_builtin_text_is_enough_for_the_default(smollm2_bf16: Path) -> None:
    samples = draw(CalibrationSpec(), smollm2_bf16, 8192)
    assert tuple(samples.ids.shape) == (128, 512)
    assert len(set(map(tuple, samples.ids.tolist()))) == 128
