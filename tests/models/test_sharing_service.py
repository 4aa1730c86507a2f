"""Prefix reuse, preemption, prompt lookup and deterministic mode on SmolLM2 through a server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from lowbit import Client
from lowbit_server.testing import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lowbit.v1.generation_pb2 import Usage

BLOCK_TOKENS = 32
FP32_TOKEN_BYTES = 30 * 3 * 64 * 2 * 4
KV_BLOCKS = 12
TEXT = topics["for"]
CODE = "def area(width, height):\n    return width * height\n\n" * 4


class Played(NamedTuple):
    """What a stream made."""

    ids: list[int]
    text: str
    usage: Usage


@pytest.fixture(scope="module")
def client(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a server with three copies of SmolLM2, each with little KV memory."""
    kv_bytes = KV_BLOCKS * BLOCK_TOKENS * FP32_TOKEN_BYTES
    environment = {
        "LOWBIT_IMPORT_ROOTS": str(smollm2_gguf.parent),
        "LOWBIT_KV_CACHE_BYTES": str(kv_bytes),
    }
    home = tmp_path_factory.mktemp("sharing") / "home"
    with ServerProcess(home, environment=environment) as server, Client(server.address) as client:
        client.wait_job(client.import_model("bf16", path=str(smollm2_gguf)).id)
        for scheme in ("fp32", "rtn"):
            client.wait_job(client.quantize("bf16", scheme, scheme, skip_evaluation=True).id)
        for name in ("bf16", "fp32", "rtn"):
            client.load(name).wait()
        yield client


def play(client: Client, model: str, prompt: Any, **options: Any) -> Played:
    """Read a stream to its end."""
    given: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "token_ids_output": True}
    given["prompt" if isinstance(prompt, str) else "messages"] = prompt
    stream = client.generate(model, **given | options)
    ids = [token for chunk in stream for token in chunk.token_ids]
    return Played(ids, stream.partial_text, stream.usage)


def test_the_next_turn_of_a_chat_reads_only_what_is_new(client: Client) -> None:
    chat = [{"role": "system", "content": TEXT[:700]}, {"role": "user", "content": "Hello!"}]
    first = play(client, "fp32", chat)
    assert first.usage.cached_tokens == 0
    chat += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Say more."},
    ]
    second = play(client, "fp32", chat)
    assert second.usage.cached_tokens % BLOCK_TOKENS == 0
    assert second.usage.cached_tokens > first.usage.prompt_tokens - BLOCK_TOKENS
    fresh = play(client, "fp32", chat, cache_salt="nobody's")
    assert fresh.usage.cached_tokens == 0
    assert second.ids == fresh.ids


def test_scores_share_a_prompt_with_streams(client: Client) -> None:
    prompt = TEXT[:600]
    play(client, "fp32", prompt, cache_salt="scores")
    answers = [[260, 270], [281]]
    shared = client.score("fp32", prompt, continuations=answers, cache_salt="scores")
    alone = client.score("fp32", prompt, continuations=answers, cache_salt="none")
    assert shared.usage.cached_tokens > 0
    assert alone.usage.cached_tokens == 0
    for one, other in zip(shared.scores, alone.scores, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_outputs_that_wait_for_memory_lose_nothing(client: Client) -> None:
    """Four outputs of some 110 tokens need 16 blocks of the 12 that there are."""
    prompts = [TEXT[100 * number :][:150] for number in range(4)]
    options = {"max_tokens": 80, "ignore_eos": True}
    alone = [play(client, "fp32", prompt, cache_salt="a", **options).ids for prompt in prompts]
    assert all(len(ids) == 80 for ids in alone)

    def beside(number: int) -> list[int]:
        return play(client, "fp32", prompts[number], cache_salt=f"b{number}", **options).ids

    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(beside, range(len(prompts)))) == alone


def test_a_draft_changes_no_token_and_makes_several_at_once(client: Client) -> None:
    plain = play(client, "fp32", CODE, max_tokens=48)
    drafted = client.generate(
        "fp32",
        CODE,
        max_tokens=48,
        temperature=0,
        token_ids_output=True,
        prompt_lookup_tokens=8,
    )
    chunks = [list(chunk.token_ids) for chunk in drafted]
    assert [token for chunk in chunks for token in chunk] == plain.ids
    assert max(map(len, chunks)) > 4
    wild = {"max_tokens": 48, "temperature": 1.0, "seed": 7}
    sampled = play(client, "fp32", CODE, **wild)
    assert play(client, "fp32", CODE, prompt_lookup_tokens=8, **wild).ids == sampled.ids


@pytest.mark.parametrize("model", ["bf16", "rtn"])
def test_deterministic_requests_are_the_same_to_the_bit(model: str, client: Client) -> None:
    options = {"deterministic": True, "logprobs": 0, "max_tokens": 24}
    prompt = TEXT[:300]

    def exact() -> tuple[list[int], list[float | None]]:
        stream = client.generate(model, prompt, temperature=0, token_ids_output=True, **options)
        chunks = list(stream)
        ids = [token for chunk in chunks for token in chunk.token_ids]
        return ids, [logprob for chunk in chunks for logprob in chunk.logprobs]

    alone = exact()
    others = [TEXT[50 * number :][: 20 + 70 * number] for number in range(4)]
    with ThreadPoolExecutor(len(others) + 2) as pool:
        company = [
            pool.submit(play, client, model, other, max_tokens=60, ignore_eos=True)
            for other in others
        ]
        found = [future.result() for future in [pool.submit(exact) for _ in range(2)]]
        assert all(len(future.result().ids) == 60 for future in company)
    assert found == [alone, alone]
