"""The Python SDK passes the suite that all SDKs pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.play import variants
from tests.conformance.run import known_failing, play_suite
from tests.conformance.schema import load, suites
from tests.conformance.testee import Testee, languages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def testee() -> Iterator[Testee]:
    """One process of the testee for all suites."""
    with Testee("python") as testee:
        yield testee


@pytest.mark.parametrize("file", list(suites()), ids=lambda file: file.stem)
def test_suite(testee: Testee, file: Path) -> None:
    problems = {name: problem for name, problem, _ in play_suite(file, testee) if problem}
    assert not problems


def test_nothing_is_known_to_fail() -> None:
    assert [name for language in languages() for name in known_failing(language)] == []


def test_names_are_unique_and_every_scenario_says_what_it_proves() -> None:
    for file in suites():
        scenarios = load(file).scenarios
        names = [name for one in scenarios for name, _ in variants(one)]
        assert len(names) == len(set(names))
        assert all(one.about for one in scenarios)
