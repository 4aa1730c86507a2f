"""Grammars that are wrong, and those that mean harm; the process is a real one."""

from __future__ import annotations

import asyncio
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.grammar.checker import CHECK_S, GrammarChecker
from lowbit_server.grammar.spec import Grammar
from tests.unit.grammar.kit import END, SIZE, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SLACK_S = 10.0
"""A process is started anew, on a machine that does other things as well."""


@pytest.fixture
async def checker(tmp_path: Path) -> AsyncIterator[Any]:
    """Yield a function that checks a grammar and returns what is wrong with it."""
    checker = GrammarChecker()
    folder = write_tokenizer(tmp_path)
    manifest: Any = SimpleNamespace(revision="1", vocab_size=SIZE, eos_token_ids=(END,))

    async def check(kind: str, text: str) -> str:
        (found,) = await asyncio.gather(
            checker.check(Grammar(kind, text), manifest, folder), return_exceptions=True
        )
        if found is None:
            return ""
        assert isinstance(found, LowbitError)
        assert found.reason is Reason.INVALID_FIELD
        (violation,) = found.violations
        assert violation.field == f"constraint.{kind}"
        return violation.description

    check.checker = checker  # type: ignore[attr-defined]
    yield check
    await checker.stop()


def chain(kind: str, length: int) -> str:
    """Return a chain of references, which the library follows by recursion."""
    if kind == "grammar":
        rules = "".join(f"r{index}: r{index + 1}\n" for index in range(length))
        return f'start: r0\n{rules}r{length}: "x"\n'
    links: dict[str, Any] = {f"d{one}": {"$ref": f"#/$defs/d{one + 1}"} for one in range(length)}
    links[f"d{length}"] = {"type": "string"}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": links})


def branches(width: int, depth: int) -> str:
    """Return a schema of width^depth combinations."""
    one_of = [
        {"anyOf": [{"type": "object", "properties": {f"p{a}_{b}": {}}} for a in range(width)]}
        for b in range(depth)
    ]
    return json.dumps({"allOf": one_of})


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", ""),
        ("regex", r"[a-z]+@\w{1,20}\.(com|org)"),
        ("regex", "(a{1,30}){1,30}"),
        ("json_schema", "{}"),
        ("json_schema", json.dumps({"enum": [f"value {index}" for index in range(5000)]})),
        ("json_schema", chain("json_schema", 50)),
        ("json_schema", json.dumps({"type": "integer", "minimum": -7, "maximum": 10**12})),
        ("grammar", 'start: "(" start ")" | "x"'),
        ("grammar", chain("grammar", 50)),
        ("choice", json.dumps([f"option {index} " + "x" * 200 for index in range(4096)])),
        ("choice", '[""]'),
    ],
)
async def test_honest_grammars_pass(checker: Any, kind: str, text: str) -> None:
    assert await checker(kind, text) == ""


@pytest.mark.parametrize(
    ("kind", "text", "wrong"),
    [
        ("regex", "a(b", "bad at its character 2: unclosed group"),
        ("regex", "x(?=y)", "bad at its character 2: look-around"),
        ("regex", r"[^\s\S]", "no text satisfies it"),
        ("json_schema", '{"a": }', "line 1 column 7"),
        ("json_schema", "true", "object"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ("json_schema", '{"$ref": "https://example.com/schema.json"}', "does not fetch"),
        ("json_schema", '{"$ref": "#/$defs/missing"}', "does not exist"),
        ("json_schema", '{"$ref": "#"}', "no text satisfies it"),
        (
            "json_schema",
            '{"type": "object", "properties": {"a": false}, "required": ["a"]}',
            "'a' is unsatisfiable",
        ),
        ("grammar", 'start: ("a"\n', "1("),
        ("grammar", 'begin: "a"', "start"),
        ("grammar", "start: start", "no text satisfies it"),
        ("choice", json.dumps(["x" * (1 << 20)]), "1048576 bytes"),
    ],
)
async def test_malformed_and_impossible_grammars_say_what_is_wrong(
    checker: Any, kind: str, text: str, wrong: str
) -> None:
    answer = await checker(kind, text)
    assert wrong in answer
    assert len(answer) < 400
    assert "\n" not in answer


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a*b*c*d*)*" * 5500),
        ("regex", "(" * 30_000 + "a" + ")" * 30_000),
        ("regex", "(a{1000}){1000}"),
        ("json_schema", chain("json_schema", 20_000)),
        ("json_schema", branches(6, 8)),
        ("json_schema", json.dumps({"enum": [f"v{index}" for index in range(90_000)]})),
        ("json_schema", '{"items":' * 20_000 + "{}" + "}" * 20_000),
        ("grammar", chain("grammar", 40_000)),
        ("grammar", "start: " + "(" * 100_000 + '"a"' + ")" * 100_000),
        (
            "grammar",
            "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"',
        ),
    ],
    ids=lambda value: value[:16],
)
async def test_explosive_grammars_are_refused_in_time_and_others_never_notice(
    checker: Any, kind: str, text: str
) -> None:
    assert await checker("regex", "warm") == ""
    began = time.monotonic()
    assert await checker(kind, text) != ""
    assert time.monotonic() - began < CHECK_S + SLACK_S
    assert await checker("regex", "afterwards") == ""


async def test_a_check_that_takes_too_long_is_ended(
    checker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await checker("regex", "warm") == ""
    monkeypatch.setattr("lowbit_server.grammar.checker.CHECK_S", 0.0)
    assert "takes more than" in await checker("regex", "a{3}")
    monkeypatch.undo()
    assert await checker("regex", "a{4}") == ""


async def test_who_goes_away_leaves_the_answer_to_others(checker: Any) -> None:
    impatient = asyncio.create_task(checker("regex", "ab{2}"))
    patient = asyncio.create_task(checker("regex", "ab{2}"))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient == ""
    with pytest.raises(asyncio.CancelledError):
        await impatient


async def test_a_known_grammar_needs_no_process(checker: Any) -> None:
    assert await checker("regex", "ab") == ""
    bad = await checker("regex", "a(b")
    await checker.checker.stop()
    assert await checker("regex", "ab") == ""
    assert await checker("regex", "a(b") == bad
    assert checker.checker._process is None
