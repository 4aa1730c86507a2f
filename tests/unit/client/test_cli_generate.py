"""`lowbit generate`: text as it is made, one document, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, TypeAlias

import grpc

from lowbit.v1.generation_pb2 import (
    ContinuationScore,
    Delta,
    GenerateResponse,
    ScoreResponse,
    TokenizeResponse,
)
from tests.unit.client.fake import Endless, events, refuse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.client.fake import FakeServer

Run: TypeAlias = "Callable[..., tuple[int, str, str]]"


def test_text_is_printed_as_it_is_made(server: FakeServer, run: Run) -> None:
    server.on["Generate"] = lambda *_: events(" Par", "is.")
    assert run("generate", "m", "The capital is", "--max-tokens", "8", "--temperature", "0") == (
        0,
        " Paris.\n",
        "",
    )
    (request,) = server.requests("Generate")
    assert request.text == "The capital is"
    assert request.stopping.max_tokens == 8
    assert request.sampling.HasField("temperature")


def test_generate_prints_one_document_with_json(server: FakeServer, run: Run) -> None:
    server.on["Generate"] = lambda *_: events("Par", "is")
    code, out, _ = run("generate", "m", "p", "--json", "--system", "be brief", "--stop", "x")
    document = json.loads(out)
    assert code == 0
    assert document["text"] == "Paris"
    assert document["finish_reason"] == "EOS"
    assert document["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "output_tokens": 2}
    assert document["timings"]["decode"] == "2s"
    (request,) = server.requests("Generate")
    assert [item.content for item in request.chat.messages] == ["be brief", "p"]
    assert list(request.stopping.strings) == ["x"]


def test_constraints_come_from_flags_and_files(
    server: FakeServer, run: Run, tmp_path: Path
) -> None:
    server.on["Generate"] = lambda *_: events()
    (tmp_path / "schema.json").write_text('{"type": "string"}')
    (tmp_path / "rules.lark").write_text('start: "é"', encoding="utf-8")
    for flags in (
        ("--json-schema", str(tmp_path / "schema.json")),
        ("--grammar", str(tmp_path / "rules.lark")),
        ("--regex", "a+"),
        ("--choice", "yes", "--choice", "no"),
    ):
        assert run("generate", "m", "p", *flags)[0] == 0
    schema, rules, regex, choice = (one.constraint for one in server.requests("Generate"))
    assert schema.json_schema == '{"type": "string"}'
    assert rules.grammar == 'start: "é"'
    assert regex.regex == "a+"
    assert list(choice.choice.options) == ["yes", "no"]
    assert run("generate", "m", "p", "--regex", "a", "--choice", "b")[0] == 2
    assert run("generate", "m", "p", "--grammar", str(tmp_path / "none"))[0] == 2


def test_a_failure_midway_leaves_the_text_and_ends_the_line(server: FakeServer, run: Run) -> None:
    def generate(_: object, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        yield GenerateResponse(delta=Delta(text="par"))
        refuse(context, grpc.StatusCode.INTERNAL, "WORKER_LOST", message="worker died")

    server.on["Generate"] = generate
    assert run("generate", "m", "p") == (
        1,
        "par\n",
        "lowbit: error: WORKER_LOST: worker died\n",
    )


def test_control_c_cancels_and_exits_with_130(server: FakeServer) -> None:
    server.on["Generate"] = endless = Endless()
    # What runs in the background of a shell without job control is started with SIGINT ignored.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from lowbit.cli import main; main()"
    command = [sys.executable, "-c", code, "--address", server.address, "generate", "m", "p"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(5) == b"first"
        process.send_signal(signal.SIGINT)
        assert endless.was_cancelled()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"\n", b"")


def test_score_prints_a_row_for_each_continuation(server: FakeServer, run: Run) -> None:
    server.on["Tokenize"] = lambda request, _: TokenizeResponse(token_ids=map(ord, request.text))
    server.on["Score"] = lambda request, _: ScoreResponse(
        scores=[
            ContinuationScore(
                token_logprobs=[-0.5] * len(one.ids), logprob=-0.5 * len(one.ids), is_greedy=True
            )
            for one in request.continuations
        ]
    )
    code, out, _ = run("score", "m", "The capital is", " [bold]", "!")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:]]
    assert rows == [
        ["'", "[bold]'", "7", "-3.500", "-0.500", "yes"],
        ["'!'", "1", "-0.500", "-0.500", "yes"],
    ]
    (request,) = server.requests("Score")
    assert request.text == "The capital is"
    assert [list(one.ids) for one in request.continuations] == [[*map(ord, " [bold]")], [33]]
    assert not any(one.add_special_tokens for one in server.requests("Tokenize"))
    code, out, _ = run("score", "m", "The capital is", "!", "--json", "--cache-salt", "s")
    assert server.requests("Score")[-1].cache_salt == "s"
    assert json.loads(out)["scores"][0]["logprob"] == -0.5


def test_more_ways_to_generate_reach_their_fields(server: FakeServer, run: Run) -> None:
    server.on["Generate"] = lambda *_: events("a")
    more = ("--deterministic", "--prompt-lookup-tokens", "4", "--cache-salt", "s")
    assert run("generate", "m", "p", "--typical-p", "0.5", "--echo", *more)[0] == 0
    assert run("generate", "m", "p")[0] == 0
    request, plain = server.requests("Generate")
    assert request.sampling.typical_p == 0.5
    assert request.output.echo
    assert (request.deterministic, request.prompt_lookup_tokens) == (True, 4)
    assert request.cache_salt == "s"
    for name in ("deterministic", "prompt_lookup_tokens"):
        assert not plain.HasField(name)
