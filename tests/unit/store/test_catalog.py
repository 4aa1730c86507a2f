"""Names of models and aliases, and what a restart makes of them."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.schemes import FloatScheme
from lowbit_server.store.artifacts import ArtifactStore
from lowbit_server.store.catalog import Catalog
from lowbit_server.store.database import Database, models
from lowbit_server.store.manifest import Manifest
from lowbit_server.store.sealing import revision_of, seal_files, write_manifest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "lowbit.db")
    yield database
    database.close()


@pytest.fixture
async def catalog(home: Path, database: Database) -> Catalog:
    return await opened(home, database)


async def opened(home: Path, database: Database) -> Catalog:
    """Return the catalog that a server which starts now has."""
    catalog = Catalog(ArtifactStore(home), database)
    await catalog.start()
    return catalog


def stage(home: Path, job: str, name: str) -> None:
    folder = ArtifactStore(home).staging(job)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files = seal_files(folder)
    manifest = Manifest(
        name=name,
        revision=revision_of(files),
        scheme=FloatScheme(type="bf16"),
        architecture="LlamaForCausalLM",
        parameters=1,
        context_tokens=128,
        vocab_size=256,
        eos_token_ids=(0,),
        files=files,
        source="somewhere",
        source_digest="0" * 64,
        create_time=datetime(2026, 1, 1, tzinfo=UTC),
        libraries={},
    )
    write_manifest(folder, manifest)


async def make(home: Path, catalog: Catalog, *names: str) -> None:
    for name in names:
        stage(home, f"job-{name}", name)
        await catalog.publish(f"job-{name}", name)


async def refused(call: Awaitable[object]) -> Reason:
    with pytest.raises(LowbitError) as caught:
        await call
    return caught.value.reason


def listed(catalog: Catalog) -> list[str]:
    return [one.name for one in catalog.manifests()]


async def indexed(database: Database) -> list[str]:
    select = sa.select(models.c.name).order_by(models.c.name)
    return await database.run(lambda connection: list(connection.execute(select).scalars()))


async def test_published_models_are_listed_by_name(home: Path, catalog: Catalog) -> None:
    changed = catalog.changed.next()
    await make(home, catalog, "b", "a")
    assert listed(catalog) == ["a", "b"]
    assert changed.is_set()
    assert catalog.resolve("a").name == "a"
    assert catalog.path(catalog.resolve("a")) == home / "models" / "a"


async def test_models_and_aliases_outlive_a_restart(
    home: Path, catalog: Catalog, database: Database
) -> None:
    await make(home, catalog, "a", "b")
    await catalog.set_alias("x", "a")
    await catalog.set_alias("x", "b")
    await catalog.set_alias("y", "x")
    again = await opened(home, database)
    assert listed(again) == ["a", "b"]
    assert again.resolve("x").name == again.resolve("y").name == "b"
    assert again.aliases_of("b") == ["x", "y"]
    assert again.aliases_of("a") == []


async def test_a_restart_brings_the_index_in_line_with_the_disk(
    home: Path, catalog: Catalog, database: Database
) -> None:
    await make(home, catalog, "removed", "kept")
    await catalog.set_alias("gone-too", "removed")
    await catalog.set_alias("stays", "kept")
    shutil.rmtree(home / "models" / "removed")
    # Published as a crash would leave it: on the disk, not in the database.
    stage(home, "job", "added")
    ArtifactStore(home).publish("job", "added")
    (home / "models" / "no-model").mkdir()
    again = await opened(home, database)
    assert listed(again) == await indexed(database) == ["added", "kept"]
    assert again.resolve("stays").name == "kept"
    with pytest.raises(LowbitError, match="gone-too"):
        again.resolve("gone-too")
    again.check_free("model", "removed")
    again.check_free("alias", "gone-too")


async def test_a_restart_clears_what_is_half_done(
    home: Path, catalog: Catalog, database: Database
) -> None:
    stage(home, "unfinished", "half")
    again = await opened(home, database)
    assert listed(again) == []
    assert not list((home / "staging").iterdir())


async def test_a_deleted_model_takes_its_aliases_along(
    home: Path, catalog: Catalog, database: Database
) -> None:
    await make(home, catalog, "a", "b")
    await catalog.set_alias("x", "a")
    await catalog.delete("a")
    assert listed(catalog) == await indexed(database) == ["b"]
    assert not (home / "models" / "a").exists()
    catalog.check_free("alias", "x")
    assert await refused(catalog.delete("a")) is Reason.MODEL_NOT_FOUND
    await make(home, catalog, "a")
    assert catalog.aliases_of("a") == []


async def test_an_alias_is_not_deleted_as_a_model(home: Path, catalog: Catalog) -> None:
    await make(home, catalog, "a")
    await catalog.set_alias("x", "a")
    assert await refused(catalog.delete("x")) is Reason.MODEL_NOT_FOUND
    await catalog.set_alias("x", "")
    assert await refused(catalog.set_alias("x", "")) is Reason.MODEL_NOT_FOUND
    assert listed(catalog) == ["a"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "x" * 129])
async def test_bad_names_are_refused(home: Path, catalog: Catalog, name: str) -> None:
    await make(home, catalog, "a")
    assert await refused(catalog.set_alias(name, "a")) is Reason.INVALID_FIELD
    for call in (catalog.resolve, lambda name: catalog.check_free("model", name)):
        with pytest.raises(LowbitError) as caught:
            call(name)
        assert caught.value.reason is Reason.INVALID_FIELD


async def test_models_and_aliases_share_one_space_of_names(home: Path, catalog: Catalog) -> None:
    await make(home, catalog, "a", "b")
    await catalog.set_alias("x", "a")
    assert await refused(catalog.set_alias("b", "a")) is Reason.MODEL_EXISTS
    for name in ("a", "x"):
        with pytest.raises(LowbitError) as caught:
            catalog.check_free("model", name)
        assert caught.value.reason is Reason.MODEL_EXISTS


async def test_a_name_that_became_an_alias_meanwhile_is_not_published(
    home: Path, catalog: Catalog
) -> None:
    await make(home, catalog, "a")
    stage(home, "job", "x")
    await catalog.set_alias("x", "a")
    assert await refused(catalog.publish("job", "x")) is Reason.MODEL_EXISTS
    assert catalog.resolve("x").name == "a"
    assert not (home / "models" / "x").exists()
