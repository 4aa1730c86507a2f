"""Shared runs, against a search that compares every run with every other."""

from __future__ import annotations

import json
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_server.quant.overlap import (
    RUN_LETTERS,
    letters,
    shared_run,
    shared_starts,
    sketch,
    sketched_run,
)

# Few letters and repeated pieces, so that long runs are shared now and then.
pieces = st.lists(st.sampled_from(["a" * 40, "ab" * 33, "b" * 70, "é0" * 50, "x"]), max_size=12)
texts = pieces.map("".join)


def runs(text: str) -> list[str]:
    return [text[at : at + RUN_LETTERS] for at in range(len(text) - RUN_LETTERS + 1)]


def prose(seed: int, words: int) -> str:
    chosen = random.Random(seed)
    lengths = [chosen.randint(2, 9) for _ in range(words)]
    return " ".join("".join(chosen.choices("etaoinshrdlu", k=length)) for length in lengths)


@given(texts, texts)
@settings(deadline=None)
def test_it_finds_what_comparing_everything_finds(one: str, other: str) -> None:
    known = set(runs(other))
    expected = [at for at, run in enumerate(runs(one)) if run in known]
    assert shared_starts(one, other).tolist() == expected
    run = shared_run(one, other)
    if min(len(one), len(other)) >= RUN_LETTERS:
        assert run == (runs(one)[expected[0]] if expected else None)
    else:
        shorter, longer = sorted((one, other), key=len)
        assert run == (shorter if shorter and shorter in longer else None)


@given(st.integers(0, 10_000), st.integers(0, 400), st.integers(0, 400), st.data())
def test_a_passage_that_was_copied_is_found(
    seed: int, before: int, after: int, data: st.DataObject
) -> None:
    """However much of other text is around it and however it is spelled."""
    passage = prose(seed, 60)
    respelled = data.draw(st.sampled_from([str.upper, str.title, lambda t: t.replace(" ", ",\n")]))
    one = prose(seed + 1, before) + " " + passage + " " + prose(seed + 2, after)
    other = prose(seed + 3, after) + " " + respelled(passage) + " " + prose(seed + 4, before)
    run = shared_run(one, other)
    assert run is not None
    assert run in letters(one)
    assert run in letters(other)


@given(st.integers(0, 10_000))
def test_different_prose_is_kept_apart(seed: int) -> None:
    # They share a sentence of less than a run.
    sentence = prose(seed, 1000)[: RUN_LETTERS - 20]
    assert shared_run(prose(seed + 1, 300) + sentence, sentence + prose(seed + 2, 300)) is None


def test_short_texts_are_compared_whole() -> None:
    assert shared_run("One sentence.", "It has one\nsentence in it.") == "onesentence"
    assert shared_run("One sentence.", "Another.") is None
    assert shared_run("", "anything") is None
    assert shared_run("... --- ...", "***") is None


def test_megabytes_take_no_time_to_speak_of() -> None:
    one = "".join(np.random.default_rng(0).choice(list("abcdefgh"), 1 << 20))
    assert shared_run(one, one[500_000:600_000]) == one[500_000 : 500_000 + RUN_LETTERS]


@given(texts, texts)
@settings(deadline=None)
def test_a_sketch_of_a_short_text_holds_all_of_it(one: str, other: str) -> None:
    found = sketched_run(other, sketch(one))
    enough = min(len(one), len(other)) >= RUN_LETTERS
    assert found == (shared_run(other, one) if enough else None)


def test_a_sketch_of_a_long_text_knows_any_page_of_it() -> None:
    text = letters(prose(1, 360_000))
    assert len(text) > 1_900_000
    known = sketch(text)
    assert len(known) == 4096
    assert len(json.dumps(known)) < 100_000
    chosen = random.Random(2)
    for _ in range(200):
        start = chosen.randrange(len(text) - 8000)
        page = text[start : start + 8000]
        run = sketched_run(f"{prose(3, 50)} {page}", known)
        assert run is not None
        assert run in page
    assert sketched_run(prose(4, 50_000), known) is None
