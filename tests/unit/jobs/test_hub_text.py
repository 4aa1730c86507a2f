"""Calibration and evaluation on hub data sets, from a server that answers as the hub does.

Jobs run as they do under the front: in processes of their own, which alone may use a network.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from lowbit_server.errors import Reason
from lowbit_server.jobs.spec import Staged
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest
from tests.models.quantkit import FAMILIES, Store, random_source
from tests.unit.hub import FakeHub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.jobs.conftest import JobProcess

    Start = Callable[..., JobProcess]

WIKITEXT = "wikitext-2-raw-v1"


def write(path: Path, what: str, column: str = "text") -> None:
    path.parent.mkdir(parents=True)
    rows = [f"Row {number} of {what}, like none of the others." for number in range(200)]
    parquet.write_table(pa.table({"id": list(range(200)), column: rows}), path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Two data sets in the hub's own layout; yields the paths that are asked for."""
    wikitext, c4 = tmp_path / "wikitext", tmp_path / "c4"
    write(wikitext / WIKITEXT / "train" / "0000.parquet", "articles to train on")
    write(wikitext / WIKITEXT / "test" / "0000.parquet", "other articles, to test with")
    write(c4 / "en" / "partial-train" / "0000.parquet", "pages of the web")
    datasets = {
        "datasets/Salesforce/wikitext": {"refs/convert/parquet": wikitext},
        "datasets/allenai/c4": {"refs/convert/parquet": c4},
    }
    with FakeHub(datasets) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub.asked


@pytest.fixture
def base(tmp_path: Path) -> None:
    Store(tmp_path).imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))


def spec(calibration: dict[str, Any], evaluation: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "kind": "quantize",
        "model": "small",
        "source": "base",
        "scheme": {"kind": "rtn"},
        "device": "cpu",
        "calibration": {"samples": 4, "sequence_tokens": 32} | calibration,
        "evaluation": evaluation and {"max_tokens": 128, "window_tokens": 64} | evaluation,
    }


def test_one_split_calibrates_and_another_evaluates(
    start: Start, base: None, hub: list[str]
) -> None:
    job = start(spec({"dataset": "wikitext2"}, {"dataset": "wikitext2"}))
    code, reports = job.finish()
    assert code == 0
    assert isinstance(reports[-1], Staged)
    manifest = Manifest.model_validate_json((job.staging / MANIFEST_FILE).read_bytes())
    assert manifest.calibration_digest
    assert manifest.quality is not None
    files = [path for path in hub if path.endswith(".parquet")]
    assert {path.rsplit("/", 2)[1] for path in files} == {"train", "test"}


def test_a_part_stands_for_a_large_data_set_and_the_cache_for_the_hub(
    start: Start, base: None, hub: list[str], tmp_path: Path
) -> None:
    assert start(spec({"dataset": "c4"})).finish()[0] == 0
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # the fixture's patch puts it back
    again = start(spec({"dataset": "c4"}), staging=tmp_path / "again")
    assert again.finish()[0] == 0
    absent = start(spec({"dataset": "wikitext2"}), staging=tmp_path / "absent").failure()
    assert absent.reason is Reason.SOURCE_NOT_FOUND


def test_the_same_split_for_both_is_refused(start: Start, base: None, hub: list[str]) -> None:
    failure = start(spec({"dataset": "c4"}, {"dataset": "c4"})).failure()
    assert failure.reason is Reason.INVALID_FIELD
    assert "pagesoftheweb" in failure.message


READ = """
import sys
from lowbit_server.errors import LowbitError
from lowbit_server.quant.hub_text import rows
for name, field in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        print(next(rows(name, field, ("train",))))
    except LowbitError as error:
        print(error.reason, *error.message.split())
"""


def test_what_a_data_set_lacks_is_named(hub: list[str]) -> None:
    asked = [("c4", "text"), ("org/absent", ""), ("allenai/c4", ""), ("c4", "body"), ("c4", "id")]
    # In a process of its own: the hub's library reads its settings when it is imported.
    command = [sys.executable, "-c", READ, *(word for pair in asked for word in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found, absent, unnamed, field, number = done.stdout.splitlines()
    assert found.startswith("Row 0 of pages of the web")
    assert absent.startswith("SOURCE_NOT_FOUND data set org/absent cannot be fetched")
    assert unnamed.startswith("SOURCE_NOT_FOUND data set allenai/c4 has no train in 'default'")
    assert field == "SOURCE_CORRUPT data set c4 has no field 'body'; it has id, text"
    assert number == "0"  # the text's reader refuses it, as in files
