"""Masks against sets of texts that are built beside the pattern, not parsed from it."""

from __future__ import annotations

import json
from functools import reduce
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowbit_server.grammar.matcher import Vocabulary
from lowbit_server.grammar.spec import Grammar, GrammarError
from tests.unit.grammar.kit import END, TOKENS, byte_vocabulary, token, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.grammar.matcher import Matcher

Language = tuple[str, frozenset[str]]
"""A pattern and all texts that match it."""
MOST_WORDS = 300


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return byte_vocabulary(tmp_path_factory.mktemp("bytes"))


def concatenated(one: Language, other: Language) -> Language:
    return one[0] + other[0], frozenset(a + b for a in one[1] for b in other[1])


def either(one: Language, other: Language) -> Language:
    return f"({one[0]}|{other[0]})", one[1] | other[1]


def repeated(one: Language, bounds: tuple[int, int]) -> Language:
    low, high = bounds
    empty: Language = ("", frozenset([""]))
    words = (reduce(concatenated, [one] * count, empty)[1] for count in range(low, high + 1))
    return f"({one[0]}){{{low},{high}}}", frozenset().union(*words)


letters = st.sampled_from(
    [
        ("a", frozenset("a")),
        ("b", frozenset("b")),
        ("[bc]", frozenset("bc")),
        ("é", frozenset("é")),
        ("[à-â]", frozenset("àáâ")),
        ("日", frozenset("日")),
        (r"\.", frozenset(".")),
        ('"', frozenset('"')),
        ("/", frozenset("/")),
    ]
)
languages = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.builds(concatenated, inner, inner),
        st.builds(either, inner, inner),
        st.builds(repeated, inner, st.sampled_from([(0, 1), (0, 2), (1, 2), (2, 2)])),
    ),
    max_leaves=6,
).filter(lambda language: len(language[1]) <= MOST_WORDS)


def follow(matcher: Matcher, texts: frozenset[str], data: st.DataObject) -> None:
    """Walk to an end and compare each mask with what the texts say."""
    words, written = {text.encode() for text in texts}, b""
    while True:
        mask = matcher.mask()
        following = {
            word[len(written)]
            for word in words
            if len(word) > len(written) and word.startswith(written)
        }
        allowed = set(mask.allowed.nonzero()[0].tolist())
        assert allowed - {END} == {TOKENS[byte] for byte in following}
        assert mask.may_end == (END in allowed) == (written in words)
        assert mask.must_end == (not following)
        if not following:
            return
        byte = data.draw(st.sampled_from(sorted(following)))
        matcher.accept(TOKENS[byte])
        written += bytes([byte])


@settings(deadline=None)
@given(language=languages, data=st.data())
def test_masks_of_a_pattern_are_just_what_its_language_allows(
    vocabulary: Vocabulary, language: Language, data: st.DataObject
) -> None:
    follow(vocabulary.compile(Grammar("regex", language[0])), language[1], data)


@settings(deadline=None)
@given(options=st.lists(st.text(max_size=6), min_size=1, max_size=8), data=st.data())
def test_masks_of_a_choice_are_just_its_options(
    vocabulary: Vocabulary, options: list[str], data: st.DataObject
) -> None:
    grammar = Grammar("choice", json.dumps(options))
    follow(vocabulary.compile(grammar), frozenset(options), data)


scalars = st.one_of(
    st.integers(-99, 99), st.booleans(), st.none(), st.text(st.sampled_from("abé日 "), max_size=4)
)


@settings(deadline=None)
@given(values=st.lists(scalars, min_size=1, max_size=5), data=st.data())
def test_masks_of_an_enum_are_its_values_as_json(
    vocabulary: Vocabulary, values: list[Any], data: st.DataObject
) -> None:
    # JSON has one form of these, where nothing is escaped that need not be.
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    assume(all(len(text) < 12 for text in texts))
    grammar = Grammar("json_schema", json.dumps({"enum": values}))
    follow(vocabulary.compile(grammar), frozenset(texts), data)


def test_a_grammar_may_nest_as_no_pattern_can(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(Grammar("grammar", 'start: "(" start ")" | "x"'))
    for text in "(((x)))":
        mask = matcher.mask()
        assert mask.allowed[token(text)]
        assert not mask.may_end
        matcher.accept(token(text))
    assert matcher.mask().must_end


def test_a_copy_goes_its_own_way(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(Grammar("regex", "ab|cd"))
    copy = matcher.copy()
    copy.accept(token("a"))
    assert copy.mask().allowed.nonzero()[0].tolist() == [token("b")]
    assert matcher.mask().allowed[token("c")]


def test_a_token_that_is_not_allowed_is_an_error_for_good(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(Grammar("regex", "ab"))
    with pytest.raises(GrammarError):
        matcher.accept(token("z"))
    with pytest.raises(GrammarError):
        matcher.mask()


def test_blanks_of_json_come_to_an_end(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.compile(Grammar("json_schema", '{"type": "array"}'))
    matcher.accept(token("["))
    for _ in range(32):
        assert matcher.mask().allowed[token(" ")]
        matcher.accept(token(" "))
    mask = matcher.mask()
    assert not mask.allowed[token(" ")]
    assert mask.allowed[token("]")]


def test_a_schema_may_not_switch_its_own_keywords_off(vocabulary: Vocabulary) -> None:
    schema = {"x-guidance": {"lenient": True}, "not": {"type": "string"}}
    with pytest.raises(GrammarError, match="not"):
        vocabulary.compile(Grammar("json_schema", json.dumps(schema)))


def test_a_model_without_an_end_cannot_be_constrained(tmp_path: Path) -> None:
    vocabulary = Vocabulary(write_tokenizer(tmp_path), 257, [])
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        vocabulary.compile(Grammar("regex", "a"))


def test_a_tokenizer_of_an_unknown_kind_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(GrammarError, match="the model's tokenizer cannot be constrained"):
        Vocabulary(tmp_path, 257, [END]).load()
