from __future__ import annotations

import errno
import hashlib
import os
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.schemes import FloatScheme
from lowbit_server.store.artifacts import ArtifactStore
from lowbit_server.store.manifest import MANIFEST_FILE, Manifest
from lowbit_server.store.sealing import (
    disk_full_is_named,
    revision_of,
    seal_files,
    write_manifest,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "home")


def stage(store: ArtifactStore, job: str, name: str) -> Path:
    folder = store.staging(job)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    files = seal_files(folder)
    manifest = Manifest(
        name=name,
        revision=revision_of(files),
        scheme=FloatScheme(type="bf16"),
        architecture="LlamaForCausalLM",
        parameters=7,
        context_tokens=8,
        vocab_size=9,
        eos_token_ids=(0,),
        files=files,
        source="/somewhere",
        source_digest="0",
        create_time=datetime.now(UTC),
        libraries={},
    )
    write_manifest(folder, manifest)
    return folder


def reason_of(caught: pytest.ExceptionInfo[LowbitError]) -> Reason:
    return caught.value.reason


def test_published_models_are_listed(store: ArtifactStore) -> None:
    staged = stage(store, "job", "tiny")
    assert store.manifests() == {}
    published = store.publish("job", "tiny")
    assert not staged.exists()
    assert store.manifests() == {"tiny": published}
    assert store.manifest("tiny") == published
    assert store.path("tiny") == store.models / "tiny"
    assert {entry.path for entry in published.files} == {"config.json", "model.safetensors"}
    assert published.disk_bytes == len("{}weights")


def test_folders_are_their_owners_only(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    home = store.models.parent
    for folder in (home, home / "staging", store.models, store.path("tiny")):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_second_store_sees_the_same(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    assert ArtifactStore(store.models.parent).manifests().keys() == {"tiny"}


def test_models_are_never_overwritten(store: ArtifactStore) -> None:
    stage(store, "one", "tiny")
    first = store.publish("one", "tiny")
    staged = stage(store, "two", "tiny")
    with pytest.raises(LowbitError) as caught:
        store.publish("two", "tiny")
    assert reason_of(caught) is Reason.MODEL_EXISTS
    assert staged.exists()
    assert store.manifest("tiny") == first


def test_a_race_to_publish_has_one_winner(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(store, "one", "tiny")
    stage(store, "two", "tiny")
    first = store.publish("one", "tiny")
    target = store.path("tiny")
    real, asked = type(target).exists, []

    def blind_once(path: Path) -> bool:
        asked.append(path)
        return real(path) if len(asked) > 1 else False

    monkeypatch.setattr(type(target), "exists", blind_once)
    with pytest.raises(LowbitError) as caught:
        store.publish("two", "tiny")
    assert reason_of(caught) is Reason.MODEL_EXISTS
    assert store.manifest("tiny") == first


@pytest.mark.parametrize("damage", ["no manifest", "cut manifest", "other name", "missing", "more"])
def test_half_done_artefacts_are_not_published(store: ArtifactStore, damage: str) -> None:
    staged = stage(store, "job", "other" if damage == "other name" else "tiny")
    match damage:
        case "no manifest":
            (staged / MANIFEST_FILE).unlink()
        case "cut manifest":
            (staged / MANIFEST_FILE).write_text((staged / MANIFEST_FILE).read_text()[:-9])
        case "missing":
            (staged / "model.safetensors").unlink()
        case "more":
            (staged / "shard-00000.part").write_bytes(b"")
    with pytest.raises(LowbitError) as caught:
        store.publish("job", "tiny")
    assert reason_of(caught) is Reason.ARTIFACT_CORRUPT
    assert store.manifests() == {}


def test_folders_that_are_no_models_are_passed_over(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    shutil.copytree(store.path("tiny"), store.path("copied"))
    store.path("empty").mkdir()
    (store.models / "file").write_text("")
    assert store.manifests().keys() == {"tiny"}
    for name in ("copied", "empty", "absent"):
        with pytest.raises(LowbitError) as caught:
            store.manifest(name)
        assert reason_of(caught) is Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../tiny", "a\0", "a\n", "x" * 300])
def test_names_cannot_leave_the_store(store: ArtifactStore, name: str) -> None:
    for call in (store.path, store.staging, store.manifest, store.delete, store.verify):
        with pytest.raises(LowbitError) as caught:
            call(name)
        assert reason_of(caught) is Reason.INVALID_FIELD


def test_discarded_jobs_leave_nothing(store: ArtifactStore) -> None:
    staged = stage(store, "job", "tiny")
    store.discard("job")
    store.discard("job")
    assert not staged.exists()


def test_recovery_removes_what_is_half_done(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    stage(store, "killed", "other")
    store.path("tiny").rename(store.models.parent / "staging" / "trash-1")
    (store.models.parent / "staging" / "file").write_text("")
    assert store.recover() == ["file", "killed", "trash-1"]
    assert store.recover() == []
    assert store.manifests() == {}


def test_deleted_models_are_gone(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    store.delete("tiny")
    assert store.manifests() == {}
    assert store.recover() == []
    with pytest.raises(LowbitError) as caught:
        store.delete("tiny")
    assert reason_of(caught) is Reason.MODEL_NOT_FOUND


def test_a_half_deleted_model_is_none(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.delete("tiny")
    monkeypatch.undo()
    assert store.manifests() == {}
    assert len(store.recover()) == 1


def test_whole_models_verify(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    assert store.verify("tiny") == (2, len("{}weights"))


def test_changed_files_are_named_with_both_digests(store: ArtifactStore) -> None:
    stage(store, "job", "tiny")
    manifest = store.publish("job", "tiny")
    (store.path("tiny") / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(LowbitError, match=r"model\.safetensors") as caught:
        store.verify("tiny")
    assert reason_of(caught) is Reason.ARTIFACT_CORRUPT
    digest = next(file.sha256 for file in manifest.files if file.path == "model.safetensors")
    assert digest in caught.value.message
    assert hashlib.sha256(b"Weights").hexdigest() in caught.value.message


@pytest.mark.parametrize("damage", ["longer", "missing", "more"])
def test_other_damage_is_named(store: ArtifactStore, damage: str) -> None:
    stage(store, "job", "tiny")
    store.publish("job", "tiny")
    file = store.path("tiny") / "model.safetensors"
    match damage:
        case "longer":
            file.write_bytes(b"weights and more")
        case "missing":
            file.unlink()
        case "more":
            file = store.path("tiny") / "pytorch_model.bin"
            file.write_bytes(b"")
    with pytest.raises(LowbitError, match=file.name) as caught:
        store.verify("tiny")
    assert reason_of(caught) is Reason.ARTIFACT_CORRUPT


def test_the_revision_depends_on_names_and_content(store: ArtifactStore) -> None:
    staged = stage(store, "job", "tiny")
    before = revision_of(seal_files(staged))
    assert revision_of(reversed(seal_files(staged))) == before
    (staged / "config.json").rename(staged / "other.json")
    renamed = revision_of(seal_files(staged))
    (staged / "other.json").write_text("[]")
    assert len({before, renamed, revision_of(seal_files(staged))}) == 3


def test_a_full_disk_has_a_name(tmp_path: Path) -> None:
    with (
        pytest.raises(LowbitError, match="12345 bytes") as caught,
        disk_full_is_named(tmp_path, 12345),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert reason_of(caught) is Reason.DISK_FULL
    assert caught.value.metadata["needed_bytes"] == "12345"
    assert int(caught.value.metadata["free_bytes"]) > 0
    with pytest.raises(PermissionError), disk_full_is_named(tmp_path):
        raise PermissionError(errno.EACCES, "no")
