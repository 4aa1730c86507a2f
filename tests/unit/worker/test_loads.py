"""Loads of a worker process over its real socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lowbit.v1.generation_pb2 import FinishReason
from lowbit.v1.model_pb2 import LoadPhase
from tests.unit.worker.harness import Front, write_scripted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Load = Callable[..., str]


def test_load_reports_its_phases_in_order(front: Front, tmp_path: Path) -> None:
    front.load("scripted", write_scripted(tmp_path / "scripted", load_ms=3))
    phases = []
    while (event := front.next_event()).WhichOneof("event") == "load_progress":
        phases.append(event.load_progress.phase)
    assert event.loaded.model == "scripted"
    assert phases == sorted(phases)
    assert set(phases) == {
        LoadPhase.LOAD_PHASE_READ,
        LoadPhase.LOAD_PHASE_PLACE,
        LoadPhase.LOAD_PHASE_WARM_UP,
    }


def test_a_live_model_is_loaded_at_once(front: Front, load_scripted: Load, tmp_path: Path) -> None:
    model = load_scripted()
    front.load(model, tmp_path / model)
    assert front.next_event().loaded.model == model


def test_requests_go_on_while_another_model_loads(
    front: Front, load_scripted: Load, tmp_path: Path
) -> None:
    model = load_scripted(step_ms=1)
    front.load("slow", write_scripted(tmp_path / "slow", load_ms=60_000))
    front.wait_for("load_progress")
    assert len(front.finished(front.submit(model, [1], max_tokens=20)).tokens) == 20


def test_unload_stops_a_load(front: Front, tmp_path: Path) -> None:
    folder = write_scripted(tmp_path / "slow", load_ms=600_000)
    front.load("slow", folder)
    front.wait_for("load_progress")
    front.unload("slow")
    assert front.wait_for("unloaded").model == "slow"
    # The loader is free again: the load did not run to its end.
    front.load("quick", write_scripted(tmp_path / "quick"))
    assert front.wait_for("loaded").model == "quick"


def test_unload_cancels_the_requests_of_its_model_only(front: Front, load_scripted: Load) -> None:
    gone, stays = load_scripted("gone", step_ms=1), load_scripted("stays", step_ms=1)
    lost, kept = front.submit(gone, [1], max_tokens=2000), front.submit(stays, [1], max_tokens=50)
    front.produced(lost, 1)
    front.unload(gone)
    assert front.wait_for("unloaded").model == gone
    assert front.results[lost].finish == FinishReason.FINISH_REASON_CANCELLED
    assert len(front.finished(kept).tokens) == 50
    assert front.finished(front.submit(gone, [1], max_tokens=1)).error


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ({"faults": [{"kind": "load_error"}]}, "scripted load error"),
        ({"step_ms": -1}, "step_ms"),
        ({"speed": 3}, "speed"),
    ],
)
def test_a_load_that_fails_says_why(
    front: Front, tmp_path: Path, script: dict[str, object], message: str
) -> None:
    front.load("bad", write_scripted(tmp_path / "bad", **script))
    failed = front.wait_for("load_failed")
    assert failed.model == "bad"
    assert message in failed.message
    assert not failed.out_of_memory


def test_a_folder_that_is_not_there_fails_the_load(front: Front, tmp_path: Path) -> None:
    front.load("none", tmp_path / "none")
    assert "FileNotFoundError" in front.wait_for("load_failed").message
