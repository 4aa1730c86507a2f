"""A real server with SmolLM2, one with TLS and tokens, and the commands of the page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from lowbit import Client
from lowbit_server.testing import ServerProcess
from tests.certificates import Authority
from tests.clients.page import PLAIN, SECURE, commands
from tests.models.conftest import smollm2_bf16, smollm2_gguf

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["smollm2_bf16", "smollm2_gguf"]

TOOLS = Path(__file__).parents[2] / "build" / "tools" / "go"
BIN = Path(sys.executable).parent
TOKEN = "a-token-of-the-page"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the tools where nobody has built them."""
    missing = [
        name for name in ("grpcurl", "grpc-health-probe", "ghz") if not (TOOLS / name).exists()
    ]
    if missing:
        reason = f"{', '.join(missing)} not built: `make clients` does that"
        for item in items:
            if "printed" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def server(smollm2_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with SmolLM2 live, as the page says it is."""
    home = tmp_path_factory.mktemp("plain") / "home"
    environment = {
        "LOWBIT_IMPORT_ROOTS": str(smollm2_bf16.parent),
        "LOWBIT_THREADS_PER_WORKER": "1",  # two wait for each other where others run too
    }
    with ServerProcess(home, environment=environment) as server:
        with Client(server.address) as client:
            client.wait_job(client.import_model("smollm2", path=str(smollm2_bf16)).id)
            client.load("smollm2").wait()
        yield server


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with TLS that asks for a token, all workers ready; ca.pem lies beside its home."""
    folder = tmp_path_factory.mktemp("secure")
    authority = Authority(folder, "ca")
    pair = authority.issue("server")
    (folder / "tokens").write_text(TOKEN)
    environment = {
        "LOWBIT_TLS_CERTIFICATE": str(pair.certificate),
        "LOWBIT_TLS_KEY": str(pair.key),
        "LOWBIT_TOKENS_FILE": str(folder / "tokens"),
    }
    credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
    with ServerProcess(folder / "home", environment=environment) as server:
        with grpc.secure_channel(server.address, credentials) as channel:
            states = HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            next(one for one in states if one.status == health_pb2.HealthCheckResponse.SERVING)
        yield server


@pytest.fixture
def printed(request: pytest.FixtureRequest, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run one command of the page, with the address of a real server."""
    command = commands()[request.param]
    folder = tmp_path
    if SECURE in command:
        server = request.getfixturevalue("secure")
        folder = server.home.parent
    else:
        server = request.getfixturevalue("server")
    path = os.pathsep.join([str(TOOLS), str(BIN), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-c", command.replace(PLAIN, server.address).replace(SECURE, server.address)],
        cwd=folder,
        env=os.environ | {"PATH": path, "LOWBIT_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
