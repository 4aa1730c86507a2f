"""What a model was made from, through a real server, after all of that is gone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowbit import Client
from lowbit_server.quant.schemes import FloatScheme, RtnScheme
from lowbit_server.store.manifest import Manifest
from lowbit_server.testing import ServerProcess
from tests.models.quantkit import FAMILIES, Store, random_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit.v1.model_pb2 import ModelFile


def listed(files: Sequence[ModelFile]) -> dict[str, tuple[int, str]]:
    return {file.path: (file.bytes, file.sha256) for file in files}


def test_the_chain_names_every_file_and_outlives_the_parents(tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    contents = {file.name: file.read_bytes() for file in source.iterdir()}
    environment = {"LOWBIT_IMPORT_ROOTS": str(tmp_path)}
    with (
        ServerProcess(tmp_path / "home", environment=environment) as server,
        Client(server.address) as client,
    ):
        client.wait_job(client.import_model("base", path=str(source)).id)
        for parent, name in (("base", "wide"), ("wide", "small")):
            scheme = "fp32" if name == "wide" else "rtn"
            client.wait_job(client.quantize(parent, name, scheme, skip_evaluation=True).id)
        base, wide = client.get_model("base"), client.get_model("wide")
        assert listed(base.source_files) == {
            name: (len(content), hashlib.sha256(content).hexdigest())
            for name, content in contents.items()
        }
        assert base.source == str(source)
        assert not base.ancestors
        for name in ("wide", "base"):
            client.delete_model(name)
        small = client.get_model("small")
        assert [one.name for one in small.ancestors] == ["wide", "base"]
        assert not small.source_files
        for one, then in zip(small.ancestors, (wide, base), strict=True):
            assert (one.revision, one.scheme, one.source) == (
                then.revision,
                then.scheme,
                then.source,
            )
            assert one.scheme_options == then.scheme_options
            assert listed(one.files) == listed(then.files)
            assert listed(one.source_files) == listed(then.source_files)
        assert {one.name for one in small.libraries} >= {"lowbit-server", "torch"}
        assert client.verify_model("small").files == len(small.files)
        command = [str(Path(sys.executable).parent / "lowbit"), "--address", server.address]
        done = subprocess.run(
            [*command, "models", "show", "small"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        chain = done.stdout.partition("lineage:\n")[2].splitlines()
        assert [line.split()[0] for line in chain[:4]] == ["small", "wide", "base", f"{source},"]
        assert {line.split(",")[0].strip() for line in chain[4:]} == set(contents)


def test_old_manifests_are_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    new = json.loads((store.models / "base" / "lowbit.json").read_bytes())
    for name in ("source_files", "source_revision", "ancestors", "calibration_digest"):
        del new[name]
    (store.models / "base" / "lowbit.json").write_text(json.dumps(new))
    assert store.manifest("base").source_files == ()
    store.quantized(RtnScheme())
    (ancestor,) = store.manifest("small").ancestors
    assert (ancestor.name, ancestor.scheme) == ("base", FloatScheme(type="bf16"))
    assert Manifest.model_validate_json(store.manifest("small").model_dump_json())


@pytest.mark.parametrize("name", ["source_digest", "files"])
def test_what_lineage_stands_on_is_never_missing(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    values = json.loads((store.models / "base" / "lowbit.json").read_bytes())
    del values[name]
    with pytest.raises(ValueError, match=name):
        Manifest.model_validate_json(json.dumps(values))
