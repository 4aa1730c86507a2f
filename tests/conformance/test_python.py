"""The Python SDK passes the suite that all SDKs pass."""

from __future__ import annotations

from tests.conformance.play import variants
from tests.conformance.run import known_failing, play_suites
from tests.conformance.schema import load, suites
from tests.conformance.testee import Testee, languages


def test_every_scenario() -> None:
    problems = {}
    seen = 0

    def report(name: str, problem: str, seconds: float) -> None:
        nonlocal seen
        seen += 1
        if problem:
            problems[name] = problem

    with Testee("python") as testee:
        play_suites(testee, report)
    assert not problems
    assert seen


def test_nothing_is_known_to_fail() -> None:
    assert [name for language in languages() for name in known_failing(language)] == []


def test_names_are_unique_and_every_scenario_says_what_it_proves() -> None:
    for file in suites():
        scenarios = load(file).scenarios
        names = [name for one in scenarios for name, _ in variants(one)]
        assert len(names) == len(set(names))
        assert all(one.about for one in scenarios)
