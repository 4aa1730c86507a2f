"""A quantization that is interrupted behind each block makes the bytes of an undisturbed one."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import CalibrationSpec
from lowbit_server.quant.registry import is_calibrated
from lowbit_server.quant.schemes import AwqScheme, Bnb4BitScheme, GptqScheme, RtnScheme
from lowbit_server.store.checkpoint import Checkpoint
from tests.models.quantkit import FAMILIES, Store, random_source

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.quant.schemes import Scheme


class Interrupted(BaseException):
    """The process is gone; nothing may catch it."""


def interrupt(monkeypatch: pytest.MonkeyPatch, finished: int) -> None:
    """Let the next job die when it has finished so many blocks more."""
    commit, left = Checkpoint.commit, finished

    def dying(self: Checkpoint, *arguments: Any) -> None:
        nonlocal left
        if not left:
            raise Interrupted
        left -= 1
        commit(self, *arguments)

    monkeypatch.setattr(Checkpoint, "commit", dying)


CALIBRATION = CalibrationSpec(
    text_inline=tuple(f"Sample {n} of many: {n * n}." for n in range(80)),
    samples=8,
    sequence_tokens=16,
)
SCHEMES: list[Scheme] = [
    RtnScheme(),
    Bnb4BitScheme(quant_type="nf4"),
    GptqScheme(),
    AwqScheme(),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a model of three layers."""
    (tmp_path / "home").mkdir()
    store = Store(tmp_path / "home")
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    return store


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_each_block_may_be_the_last_of_a_process(store: Store, scheme: Scheme) -> None:
    calibration = CALIBRATION if is_calibrated(scheme) else None
    whole = store.quantized(scheme, "whole", calibration=calibration)
    processes = 1
    while True:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, 1)
            try:
                made = store.quantized(scheme, "small", calibration=calibration)
                break
            except Interrupted:
                shutil.rmtree(store.models / "small")
                processes += 1
    # One for what belongs to no layer and one for each of the three layers.
    assert processes == 4
    for file in whole.iterdir():
        if file.name != "lowbit.json":
            assert (made / file.name).read_bytes() == file.read_bytes(), file.name
    assert store.manifest("small").files == store.manifest("whole").files


def test_another_source_or_calibration_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2)
        with pytest.raises(Interrupted):
            store.quantized(GptqScheme(), calibration=CALIBRATION)
    before = store.manifest("base")
    shutil.rmtree(store.models / "small")
    shutil.rmtree(store.models / "base")
    store.imported(tmp_path / "source", kind="fp32")
    after = store.manifest("base")
    with pytest.raises(LowbitError) as caught:
        store.quantized(GptqScheme(), calibration=CALIBRATION.model_copy(update={"seed": 1}))
    assert caught.value.reason is Reason.CHECKPOINT_MISMATCH
    assert caught.value.metadata["fields"].split(", ")[:2] == ["calibration", "source"]
    assert f"source was {before.revision}, is {after.revision}" in caught.value.message
