from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.sources import inspect, locate
from lowbit_server.testing import scripted_model

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def safetensors(*names: str) -> bytes:
    header = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4 * len(names))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def folder(root: Path) -> Path:
    folder = root / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors("a", "b"))
    return folder


def refused(path: str | Path, root: Path, *, scripted: bool = False) -> tuple[Reason, str]:
    with pytest.raises(LowbitError) as caught:
        inspect(str(path), [root], scripted=scripted)
    return caught.value.reason, caught.value.message


def test_a_folder_is_described(folder: Path, root: Path) -> None:
    source = inspect(str(folder), [root], scripted=False)
    assert (source.kind, source.architecture) == ("folder", "LlamaForCausalLM")
    assert source.weights == (folder / "model.safetensors",)
    assert source.bytes == (folder / "model.safetensors").stat().st_size


def test_a_relative_path_is_below_a_root(folder: Path, root: Path) -> None:
    assert inspect("model", [root / "none", root], scripted=False).path == folder


def test_a_root_may_be_a_link(folder: Path, root: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(root)
    assert inspect("model", [link], scripted=False).path == folder


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../secret", "model/../../secret", "/", "..", "a\0b", "~/x"]
)
def test_paths_outside_are_refused(path: str, folder: Path, root: Path) -> None:
    (root.parent / "secret").mkdir()
    reason = refused(path, root)[0]
    assert reason is (Reason.SOURCE_NOT_FOUND if path == "~/x" else Reason.SOURCE_NOT_ALLOWED)


def test_without_roots_nothing_is_allowed(folder: Path) -> None:
    with pytest.raises(LowbitError) as caught:
        inspect(str(folder), [], scripted=False)
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED


def test_a_missing_path_is_not_found(root: Path) -> None:
    assert refused("nothing", root)[0] is Reason.SOURCE_NOT_FOUND
    assert refused("n" * 5000, root)[0] is Reason.SOURCE_NOT_FOUND


def test_links_that_leave_are_refused(folder: Path, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    assert refused("link", root)[0] is Reason.SOURCE_NOT_ALLOWED


def test_links_of_files_that_leave_are_refused(folder: Path, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    reason, message = refused(folder, root)
    assert reason is Reason.SOURCE_NOT_ALLOWED
    assert "tokenizer.json" in message


def test_links_inside_are_followed(folder: Path, root: Path) -> None:
    (folder / "model.safetensors").rename(root / "blob")
    (folder / "model.safetensors").symlink_to(root / "blob")
    assert inspect(str(folder), [root], scripted=False).bytes == (root / "blob").stat().st_size


def test_a_loop_of_links_is_not_followed(root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    assert refused("a", root)[0] is Reason.SOURCE_NOT_FOUND


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_pickles_are_refused_by_name(suffix: str, folder: Path, root: Path) -> None:
    (folder / "model.safetensors").unlink()
    pickled = folder / f"weights.{suffix}"
    pickled.write_bytes(b"\x80\x04.")
    for path in (folder, pickled):
        reason, message = refused(path, root)
        assert reason is Reason.SOURCE_UNSUPPORTED
        assert pickled.name in message
        assert "safetensors" in message


def test_pickles_beside_safetensors_are_left_alone(folder: Path, root: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert len(inspect(str(folder), [root], scripted=False).weights) == 1


def test_pickles_in_an_index_are_refused(folder: Path, root: Path) -> None:
    (folder / "model.safetensors").unlink()
    index(folder, {"a": "pytorch_model.bin"})
    assert refused(folder, root)[0] is Reason.SOURCE_UNSUPPORTED


def test_other_files_are_refused(folder: Path, root: Path) -> None:
    (folder / "notes.txt").write_text("")
    assert refused(folder / "notes.txt", root)[0] is Reason.SOURCE_UNSUPPORTED
    os.mkfifo(folder / "pipe.gguf")
    assert refused(folder / "pipe.gguf", root)[0] is Reason.SOURCE_UNSUPPORTED


@pytest.mark.parametrize(
    ("config", "reason", "says"),
    [
        ("{", Reason.SOURCE_CORRUPT, "no valid JSON"),
        ("[1]", Reason.SOURCE_CORRUPT, "no JSON object"),
        ("[" * 100_000, Reason.SOURCE_CORRUPT, "no valid JSON"),
        ("9" * 5000, Reason.SOURCE_CORRUPT, "no valid JSON"),
        (b"\xff", Reason.SOURCE_CORRUPT, "no valid JSON"),
        ("{}", Reason.SOURCE_UNSUPPORTED, "no architecture"),
        ('{"architectures": []}', Reason.SOURCE_UNSUPPORTED, "no architecture"),
        (json.dumps(CONFIG | {"auto_map": {}}), Reason.SOURCE_UNSUPPORTED, "auto_map"),
        (None, Reason.SOURCE_UNSUPPORTED, "no config.json"),
    ],
)
def test_configs_are_judged(
    config: str | bytes | None, reason: Reason, says: str, folder: Path, root: Path
) -> None:
    file = folder / "config.json"
    if config is None:
        file.unlink()
    else:
        file.write_bytes(config.encode() if isinstance(config, str) else config)
    found, message = refused(folder, root)
    assert found is reason
    assert says in message


def test_a_huge_config_is_not_read(folder: Path, root: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**30)
    reason, message = refused(folder, root)
    assert reason is Reason.SOURCE_CORRUPT
    assert "more than" in message


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    (folder / "one.safetensors").write_bytes(safetensors("a"))
    (folder / "two.safetensors").write_bytes(safetensors("b", "c"))
    index(folder, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return folder


def test_shards_are_found(folder: Path, root: Path) -> None:
    source = inspect(str(sharded(folder)), [root], scripted=False)
    assert [file.name for file in source.weights] == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        {},
        {"a": 1},
        {"a": ""},
        {"a": "."},
        {"a": ".."},
        {"a": "../model/one.safetensors"},
        {"a": "/etc/passwd"},
        {"a": "sub/one.safetensors"},
        {"a": "missing.safetensors"},
        {"a": "two.safetensors"},
        {"zzz": "one.safetensors"},
    ],
)
def test_lying_indexes_are_refused(weight_map: Any, folder: Path, root: Path) -> None:
    sharded(folder)
    index(folder, weight_map)
    assert refused(folder, root)[0] is Reason.SOURCE_CORRUPT


def test_a_tensor_in_two_shards_is_refused(folder: Path, root: Path) -> None:
    sharded(folder)
    (folder / "two.safetensors").write_bytes(safetensors("a", "b", "c"))
    reason, message = refused(folder, root)
    assert reason is Reason.SOURCE_CORRUPT
    assert "'a'" in message


def test_a_truncated_shard_is_refused(folder: Path, root: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refused(folder, root)[0] is Reason.SOURCE_CORRUPT


def test_a_folder_of_gguf_asks_for_the_file(folder: Path, root: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")
    reason, message = refused(folder, root)
    assert reason is Reason.SOURCE_UNSUPPORTED
    assert "model.gguf" in message
    assert refused(folder / "model.gguf", root)[0] is Reason.SOURCE_CORRUPT


def test_scripted_models_are_for_tests_only(root: Path) -> None:
    folder = scripted_model(root / "scripted")
    assert refused(folder, root)[0] is Reason.SOURCE_UNSUPPORTED
    assert inspect(str(folder), [root], scripted=True).kind == "scripted"
    (folder / "tokenizer.json").unlink()
    assert refused(folder, root, scripted=True)[0] is Reason.SOURCE_UNSUPPORTED


def test_locate_finds_text_files(root: Path) -> None:
    (root / "text.txt").write_text("x")
    assert locate("text.txt", [root]) == root / "text.txt"
