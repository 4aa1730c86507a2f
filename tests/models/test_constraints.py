"""Constrained outputs of a real model through a real server."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit import Client
from lowbit.v1.generation_pb2 import FinishReason
from lowbit_server.testing import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lowbit.sync.stream import GenerateStream

EOS = FinishReason.FINISH_REASON_EOS
MAX_TOKENS = FinishReason.FINISH_REASON_MAX_TOKENS
HOT = 3.0
"""At this temperature the model alone writes no two words of sense."""
PROMPT = "The answer, in the form that was asked for:"
REAL_SERVER = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    home = tmp_path_factory.mktemp("constraints") / "home"
    environment = {"LOWBIT_IMPORT_ROOTS": str(smollm2_gguf.parent)}
    with ServerProcess(home, environment=environment) as server:
        with Client(server.address) as client:
            client.wait_job(client.import_model("smol", path=str(smollm2_gguf)).id)
            client.load("smol").wait()
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def run(client: Client, **options: Any) -> GenerateStream:
    """Generate to the end."""
    stream = client.generate("smol", PROMPT, **{"max_tokens": 64, "temperature": HOT} | options)
    stream.text()
    return stream


# Patterns of both dialects, and no longer than the tokens they get.
options_ = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), max_size=12)
letters = st.sampled_from(["a", "b", "é", "日", r"\.", "[a-f]", "[0-9]", "[^x]", "😀", " "])
patterns = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{0,3}", "{1,2}"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    ),
    max_leaves=5,
)


@REAL_SERVER
@given(pattern=patterns, seed=st.integers(0, 2**32))
def test_the_whole_output_matches_any_pattern(client: Client, pattern: str, seed: int) -> None:
    stream = run(client, regex=pattern, seed=seed, max_tokens=256)
    assert stream.finish_reason == EOS
    assert re.fullmatch(pattern, stream.partial_text)


@REAL_SERVER
@given(options=st.lists(options_, min_size=1, max_size=6), seed=st.integers(0, 2**32))
def test_any_choice_is_one_of_its_options(client: Client, options: list[str], seed: int) -> None:
    stream = run(client, choice=options, seed=seed)
    assert stream.finish_reason == EOS
    assert stream.partial_text in options
