"""The SQLite file: transactions and what a full disk looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.database import Database, aliases, models

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "lowbit.db")
    yield database
    database.close()


def add(name: str) -> sa.Insert:
    return models.insert().values(name=name, revision="r", create_time="now")


def names(connection: sa.Connection) -> list[str]:
    return list(connection.execute(sa.select(models.c.name)).scalars())


async def test_it_is_in_wal_mode_and_syncs(database: Database) -> None:
    def pragma(name: str) -> object:
        return lambda connection: connection.exec_driver_sql(f"PRAGMA {name}").scalar()

    assert await database.run(pragma("journal_mode")) == "wal"
    assert await database.run(pragma("synchronous")) == 2
    assert await database.run(pragma("foreign_keys")) == 1


async def test_an_exception_takes_everything_back(database: Database) -> None:
    def query(connection: sa.Connection) -> None:
        connection.execute(add("lost"))
        raise RuntimeError

    await database.run(lambda connection: connection.execute(add("kept")))
    with pytest.raises(RuntimeError):
        await database.run(query)
    assert await database.run(names) == ["kept"]


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Database(tmp_path / "lowbit.db")
    await first.run(lambda connection: connection.execute(add("kept")))
    first.close()
    second = Database(tmp_path / "lowbit.db")
    assert await second.run(names) == ["kept"]
    second.close()


async def test_a_models_aliases_go_with_it(database: Database) -> None:
    def query(connection: sa.Connection) -> int | None:
        connection.execute(add("model"))
        connection.execute(aliases.insert().values(alias="alias", model="model"))
        connection.execute(models.delete())
        return connection.execute(sa.select(sa.func.count()).select_from(aliases)).scalar()

    assert await database.run(query) == 0


async def test_a_full_disk_is_named(database: Database) -> None:
    def fill(connection: sa.Connection) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        for index in range(10_000):
            connection.execute(add(f"model-{index}"))

    with pytest.raises(LowbitError) as caught:
        await database.run(fill)
    assert caught.value.reason is Reason.DISK_FULL
    assert await database.run(names) == []
