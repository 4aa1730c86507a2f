"""The SQLite file of a store: models, aliases, jobs and their events."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import sqlalchemy as sa

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")

metadata = sa.MetaData()

models = sa.Table(
    "models",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("revision", sa.String, nullable=False),
    sa.Column("create_time", sa.String, nullable=False),
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("alias", sa.String, primary_key=True),
    sa.Column("model", sa.ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String, unique=True, nullable=False),
    sa.Column("state", sa.String, index=True, nullable=False),
    sa.Column("request_id", sa.String, unique=True),
    sa.Column("record", sa.String, nullable=False),
)

job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job", sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("sequence", sa.Integer, primary_key=True),
    sa.Column("record", sa.String, nullable=False),
)


class Database:
    """Owns the one connection; every statement runs on the database's own thread."""

    def __init__(self, path: Path) -> None:
        """Open or create the file at `path`."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._engine = sa.create_engine(
            f"sqlite:///{path}",
            poolclass=sa.StaticPool,
            connect_args={"check_same_thread": False},
        )
        sa.event.listen(self._engine, "connect", _set_pragmas)
        metadata.create_all(self._engine)

    async def run(self, query: Callable[[sa.Connection], T]) -> T:
        """Run `query` in one transaction; an exception rolls it back."""
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._transaction, query
        )

    def _transaction(self, query: Callable[[sa.Connection], T]) -> T:
        try:
            with self._engine.begin() as connection:
                return query(connection)
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                message = "the disk of the database is full"
                raise LowbitError(Reason.DISK_FULL, message) from error
            raise

    def close(self) -> None:
        """Wait for running statements and close the file."""
        self._thread.shutdown()
        self._engine.dispose()


def _set_pragmas(connection: Any, _record: object) -> None:  # noqa: ANN401 - sqlite3's own type
    cursor = connection.cursor()
    # WAL: a reader never blocks a writer and a killed process leaves whole
    # transactions only. FULL: what a client was told survives a power cut.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
