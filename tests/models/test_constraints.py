"""Constrained outputs of a real model through a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit import Client, InvalidArgumentError
from lowbit.v1.generation_pb2 import FinishReason
from lowbit_server.testing import ServerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lowbit.sync.stream import GenerateStream

EOS = FinishReason.FINISH_REASON_EOS
STOP = FinishReason.FINISH_REASON_STOP
HOT = 3.0
"""At this temperature the model alone writes no two words of sense."""
PROMPT = "The answer, in the form that was asked for:"
EXAMPLE = Path(__file__).parents[2] / "examples" / "structured.py"
REAL_SERVER = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def server(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with SmolLM2 in fp32, where a batch changes no greedy token."""
    home = tmp_path_factory.mktemp("constraints") / "home"
    environment = {"LOWBIT_IMPORT_ROOTS": str(smollm2_gguf.parent)}
    with ServerProcess(home, environment=environment) as server:
        with Client(server.address) as client:
            client.wait_job(client.import_model("base", path=str(smollm2_gguf)).id)
            job = client.quantize("base", "smol", "fp32", skip_evaluation=True)
            client.wait_job(job.id)
            client.load("smol").wait()
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def run(client: Client, prompt: str = PROMPT, **options: Any) -> GenerateStream:
    """Generate to the end."""
    stream = client.generate("smol", prompt, **{"max_tokens": 64, "temperature": HOT} | options)
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


# Each schema beside what a value of it must be, said without the schema.


def is_person(value: Any) -> bool:
    return (
        [*value] == ["name", "age", "tags"]
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and 1 <= len(value["tags"]) <= 2
        and all(tag in {"new", "köln", "東京", None} for tag in value["tags"])
    )


def is_tree(value: Any) -> bool:
    return (
        [*value] == ["leaf", "children"]
        and isinstance(value["leaf"], bool)
        and len(value["children"]) <= 2
        and all(child in ({"leaf": True}, {"leaf": False}) for child in value["children"])
    )


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {
            "type": "array",
            "items": {"enum": ["new", "köln", "東京", None]},
            "minItems": 1,
            "maxItems": 2,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "twig": {
            "type": "object",
            "properties": {"leaf": {"type": "boolean"}},
            "required": ["leaf"],
            "additionalProperties": False,
        },
        "tree": {
            "type": "object",
            "properties": {
                "leaf": {"$ref": "#/$defs/twig/properties/leaf"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/twig"}, "maxItems": 2},
            },
            "required": ["leaf", "children"],
            "additionalProperties": False,
        },
    },
    "$ref": "#/$defs/tree",
}
SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (PERSON, is_person),
    (TREE, is_tree),
    ({"type": "boolean"}, lambda value: isinstance(value, bool)),
    ({"const": {"è": [1, None]}}, lambda value: value == {"è": [1, None]}),
    (
        {"anyOf": [{"type": "integer", "minimum": -7, "maximum": 300}, {"type": "null"}]},
        lambda value: value is None or -7 <= value <= 300,
    ),
    (
        {"type": "string", "pattern": "^[à-ü]{3}-[0-9]{2}$"},
        lambda value: re.fullmatch("[à-ü]{3}-[0-9]{2}", value) is not None,
    ),
]


@pytest.mark.parametrize(("schema", "holds"), SCHEMAS)
@pytest.mark.parametrize("temperature", [0.0, HOT])
def test_each_output_is_json_of_its_schema(
    client: Client, schema: dict[str, Any], holds: Callable[[Any], bool], temperature: float
) -> None:
    stream = client.generate(
        "smol", PROMPT, json_schema=schema, temperature=temperature, n=2, seed=1, max_tokens=500
    )
    texts = stream.texts()
    assert len(texts) == 2
    for index, text in enumerate(texts):
        assert stream.all_finished[index].reason == EOS
        assert holds(json.loads(text)), text


def test_a_grammar_of_rules_is_followed(client: Client) -> None:
    rules = """
        start: term (("+" | "-") term)~2
        term: NUMBER | "(" start ")"
        NUMBER: /[1-9][0-9]{0,2}/
    """
    stream = run(client, grammar=rules, seed=4, max_tokens=400)
    assert stream.finish_reason == EOS
    assert re.fullmatch(r"[0-9()+-]+", stream.partial_text)
    assert isinstance(eval(stream.partial_text), int)  # digits, brackets, plus and minus


# Beside everything else


def test_free_neighbours_write_what_they_write_alone(client: Client) -> None:
    prompts = ["The capital of France is", "Water boils at"]
    alone = [run(client, prompt, temperature=0).partial_text for prompt in prompts]
    constrained = [
        client.generate("smol", PROMPT, max_tokens=64, seed=seed, **options)
        for seed, options in enumerate(
            [{"json_schema": PERSON}, {"regex": "[a-z ]{80}"}, {"choice": ["yes", "no"]}]
        )
    ]
    free = [client.generate("smol", prompt, max_tokens=64, temperature=0) for prompt in prompts]
    assert [stream.text() for stream in free] == alone
    for stream in constrained:
        stream.text()
        assert stream.finish_reason is not None


def test_the_same_seed_gives_the_same_constrained_text(client: Client) -> None:
    options = {"json_schema": PERSON, "seed": 7, "max_tokens": 300}
    once, again = run(client, **options), run(client, **options)
    drafted = run(client, **options, prompt_lookup_tokens=4)
    assert once.partial_text == again.partial_text == drafted.partial_text


def test_ignored_ends_and_least_tokens_yield_to_a_finished_constraint(client: Client) -> None:
    stream = run(client, choice=["yes"], ignore_eos=True, min_tokens=30)
    assert (stream.partial_text, stream.finish_reason) == ("yes", EOS)
    assert stream.usage is not None
    assert stream.usage.output_tokens < 30


def test_least_tokens_choose_the_longer_way(client: Client) -> None:
    stream = run(client, regex="(ab )*", min_tokens=20, max_tokens=40)
    assert stream.usage is not None
    assert 20 <= stream.usage.output_tokens <= 40


def test_a_stop_string_cuts_a_constrained_output(client: Client) -> None:
    stream = run(client, choice=["one, two, three"], stop=[", three"])
    assert (stream.partial_text, stream.finish_reason) == ("one, two", STOP)


def test_log_probabilities_are_those_of_the_model(client: Client) -> None:
    stream = client.generate("smol", PROMPT, choice=["xylophone"], logprobs=1, temperature=1)
    chunks = [*stream]
    found = [one for chunk in chunks for one in chunk.logprobs]
    assert min(found) < -5, "a text that is forced would be certain"
    ids = client.tokenize("smol", "xylophone", add_special_tokens=False).token_ids
    scored = client.score("smol", PROMPT, continuations=[ids]).scores[0].token_logprobs
    assert found[: len(ids)] == pytest.approx(list(scored), abs=1e-3)


# Refusals


def test_a_conflict_is_an_error_of_the_request(client: Client) -> None:
    (yes,) = client.tokenize("smol", "yes", add_special_tokens=False).token_ids
    with pytest.raises(InvalidArgumentError, match="leave nothing of what it allows"):
        run(client, choice=["yes"], bad_words=[[yes]])
    assert run(client, choice=["yes"]).partial_text == "yes"


def test_what_the_model_has_no_tokens_for_is_refused(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match=r"constraint.choice: .*(no tokens|can write)"):
        run(client, choice=["\x13"])


def test_a_bad_constraint_names_its_field_and_place(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        run(client, regex="a(b")
    assert refused.value.violations[0].field == "constraint.regex"
    assert "at its character 2: unclosed group" in refused.value.violations[0].description


def test_the_example_runs(server: ServerProcess) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "smol"],
        env=os.environ | {"LOWBIT_ADDRESS": server.address},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    person, sentiment, date, way = done.stdout.splitlines()
    assert set(json.loads(person.partition(": ")[2])) == {"name", "age", "languages"}
    assert sentiment.partition(": ")[2] in {"positive", "negative", "mixed"}
    assert re.fullmatch(r"date: [0-9]{4}-[0-9]{2}-[0-9]{2}", date)
    assert re.fullmatch(r"way: turn (left|right), then turn (left|right)", way)
