"""A quantization that is interrupted behind each block makes the bytes of an undisturbed one."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.quant.schemes import Bnb4BitScheme, RtnScheme
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


@pytest.mark.parametrize(
    "scheme", [RtnScheme(), Bnb4BitScheme(quant_type="nf4")], ids=lambda scheme: scheme.name
)
def test_each_block_may_be_the_last_of_a_process(tmp_path: Path, scheme: Scheme) -> None:
    (tmp_path / "home").mkdir()
    store = Store(tmp_path / "home")
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    whole = store.quantized(scheme, "whole")
    processes = 1
    while True:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, 1)
            try:
                made = store.quantized(scheme, "small")
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
