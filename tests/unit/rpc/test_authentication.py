"""Whose beginnings of prompts a call shares: digests of the token and of the salt."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

import grpc
import pytest

from lowbit.v1 import generation_pb2 as pb
from lowbit.v1.generation_pb2_grpc import (
    GenerationServiceServicer,
    GenerationServiceStub,
    add_GenerationServiceServicer_to_server,
)
from lowbit_server.rpc.authentication import TokenInterceptor, cache_salt
from lowbit_server.rpc.interceptors import PublicInterceptor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from lowbit_server.rpc.context import Context


class Salts(GenerationServiceServicer):
    """Answers with the digest that its method sees."""

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        salt = cache_salt(request.cache_salt)
        tokens = pb.ContinuationScore(token_logprobs=list(salt))
        return pb.ScoreResponse(scores=[tokens])


@pytest.fixture(params=[True, False], ids=["tokens", "no tokens"])
async def stub(request: pytest.FixtureRequest) -> AsyncIterator[GenerationServiceStub]:
    tokens = [TokenInterceptor(["one", "two"])] if request.param else []
    server = grpc.aio.server(interceptors=[*tokens, PublicInterceptor()])
    add_GenerationServiceServicer_to_server(Salts(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield GenerationServiceStub(channel)
    await server.stop(None)


async def salt(stub: GenerationServiceStub, token: str, given: str) -> bytes:
    """Return what the server made of a call's token and salt."""
    request = pb.ScoreRequest(
        model="m", text="p", continuations=[pb.TokenIds(ids=[1])], cache_salt=given
    )
    metadata = (("authorization", f"Bearer {token}"),)
    response = await stub.Score(request, metadata=metadata, timeout=10)
    return bytes(map(int, response.scores[0].token_logprobs))


async def test_a_salt_is_shared_under_one_token_only(
    stub: GenerationServiceStub, request: pytest.FixtureRequest
) -> None:
    asked = [(token, given) for token in ("one", "two") for given in ("", "a", "b")]
    salts = {one: await salt(stub, *one) for one in asked}
    for one in asked:
        assert await salt(stub, *one) == salts[one]
    if "no tokens" in request.node.name:  # what nobody checked says nothing
        assert {salts["one", given] == salts["two", given] for given in ("", "a", "b")} == {True}
        assert salts["one", "a"] == sha256(b"a").digest()
    else:
        assert len(set(salts.values())) == len(asked)
