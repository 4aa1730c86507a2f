"""A fake server and clients of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import pytest

from lowbit import AsyncClient, Client, ClientOptions
from lowbit.cli import main
from tests.unit.client.fake import FakeServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

Run: TypeAlias = "Callable[..., tuple[int, str, str]]"
OPTIONS = ClientOptions(first_backoff_s=0.01, max_backoff_s=0.05, resume_timeout_s=10)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address, OPTIONS) as made:
        yield made


@pytest.fixture
async def aclient(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, OPTIONS) as made:
        yield made


@pytest.fixture
def run(server: FakeServer, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command; return its exit code, standard output and standard error."""

    def runner(*arguments: str, address: str = server.address) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["--address", address, *arguments])
        out, err = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return runner
