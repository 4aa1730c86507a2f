"""Each command of docs/clients.md for foreign tools, run as printed; what the tool then says."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowbit.status.v1.status_pb2 import ErrorInfo
from lowbit_server.server import SERVICES
from tests.clients.page import commands, shell

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Done = subprocess.CompletedProcess[str]

TESTED: set[str] = set()
RULES = Path(__file__).parent / "client.mk"


def run_as(title: str) -> Callable[[Callable[..., None]], Any]:
    """Give a test what the command of this title printed."""
    TESTED.add(title)
    return pytest.mark.parametrize("printed", [title], indirect=True)


def good(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def messages(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects that follow each other in a text."""
    decoder, found = json.JSONDecoder(), []
    while text := text.strip():
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:]
    return found


def check_generation(events: list[dict[str, Any]]) -> None:
    """Expect a whole greedy stream of SmolLM2, token by token."""
    assert [int(event.get("sequence", 0)) for event in events] == list(range(len(events)))
    assert events[0]["started"]["model"] == "smollm2"
    texts = [event["delta"].get("text", "") for event in events if "delta" in event]
    assert len(texts) > 4
    assert "Paris" in "".join(texts)
    assert events[-2]["outputFinished"]["reason"] == "FINISH_REASON_MAX_TOKENS"
    assert events[-1]["completed"]["usage"]["outputTokens"] == 8


def check_load(report: dict[str, Any], calls: int) -> None:
    """Expect that ghz got an answer for each call."""
    assert report["count"] == calls
    assert report["statusCodeDistribution"] == {"OK": calls}
    assert not report["errorDistribution"]
    assert report["rps"] > 0


def test_every_command_of_the_page_is_tested() -> None:
    installed = {title for title, command in commands().items() if command.startswith("go ")}
    assert commands().keys() == TESTED | installed


def test_the_page_names_the_versions_that_are_tested() -> None:
    pins = re.findall(r"PACKAGE := (\S+)", RULES.read_text())
    assert len(pins) == 3
    assert re.findall(r"go install (\S+)", shell()) == pins


@run_as("list the services")
def test_grpcurl_lists_the_services(printed: Done) -> None:
    others = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert set(good(printed).split()) == {*SERVICES, *others}


@run_as("describe a message")
def test_grpcurl_describes_a_message(printed: Done) -> None:
    text = good(printed)
    assert "lowbit.v1.Sampling sampling = 5" in text
    assert "oneof input" in text


@run_as("describe a method")
def test_grpcurl_describes_a_method(printed: Done) -> None:
    assert "returns ( stream .lowbit.v1.GenerateResponse );" in good(printed)


@run_as("call")
def test_grpcurl_calls(printed: Done) -> None:
    (answer,) = messages(good(printed))
    (model,) = answer["models"]
    assert (model["name"], model["scheme"]) == ("smollm2", "bf16")
    assert model["replicas"][0]["state"] == "REPLICA_STATE_LIVE"


@run_as("stream")
def test_grpcurl_streams(printed: Done) -> None:
    check_generation(messages(good(printed)))


@run_as("see what is wrong with a request")
def test_grpcurl_shows_the_details_of_a_refusal(printed: Done) -> None:
    assert printed.returncode == 64 + 3  # INVALID_ARGUMENT
    assert "Code: InvalidArgument" in printed.stderr
    assert '"reason": "INVALID_FIELD"' in printed.stderr
    assert '"domain": "lowbit"' in printed.stderr
    assert '"field": "sampling.temperature"' in printed.stderr
    assert '"field": "sampling.top_p"' in printed.stderr


@run_as("probe the server")
def test_the_probe_finds_the_server_healthy(printed: Done) -> None:
    good(printed)
    assert "status: SERVING" in printed.stderr


@run_as("probe one service")
def test_the_probe_finds_a_service_healthy(printed: Done) -> None:
    good(printed)
    assert "status: SERVING" in printed.stderr


@run_as("probe one worker")
def test_the_probe_finds_a_worker_healthy(printed: Done) -> None:
    good(printed)
    assert "status: SERVING" in printed.stderr


@run_as("load with single calls")
def test_ghz_makes_single_calls(printed: Done) -> None:
    check_load(json.loads(good(printed)), 2000)


@run_as("load with streams")
def test_ghz_reads_streams(printed: Done) -> None:
    check_load(json.loads(good(printed)), 16)


@run_as("list methods with buf")
def test_buf_lists_the_methods(printed: Done) -> None:
    assert "lowbit.v1.GenerationService/Generate" in good(printed).split()


@run_as("call with buf")
def test_buf_calls(printed: Done) -> None:
    (answer,) = messages(good(printed))
    assert answer["tokenIds"]


@run_as("stream with buf")
def test_buf_streams(printed: Done) -> None:
    check_generation(messages(good(printed)))


@run_as("see what is wrong with buf")
def test_buf_shows_the_details_of_a_refusal(printed: Done) -> None:
    assert printed.returncode != 0
    (failure,) = messages(printed.stderr)
    assert failure["code"] == "not_found"
    (detail,) = failure["details"]
    assert detail["type"] == "google.rpc.ErrorInfo"
    info = ErrorInfo.FromString(base64.b64decode(detail["value"] + "=="))
    assert info.reason == "MODEL_NOT_FOUND"


@run_as("list the services of a server with TLS and tokens")
def test_grpcurl_speaks_tls_and_has_a_token(printed: Done) -> None:
    assert set(SERVICES) < set(good(printed).split())


@run_as("probe a server with TLS")
def test_the_probe_needs_no_token(printed: Done) -> None:
    good(printed)
    assert "status: SERVING" in printed.stderr


@run_as("call a server with TLS and tokens with buf")
def test_buf_speaks_tls_and_has_a_token(printed: Done) -> None:
    (answer,) = messages(good(printed))
    assert answer["devices"][0]["name"] == "cpu"


@run_as("load a server with TLS and tokens")
def test_ghz_speaks_tls_and_has_a_token(printed: Done) -> None:
    check_load(json.loads(good(printed)), 100)
