"""Runs the conformance suite: `python -m tests.conformance.run --lang go rust`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conformance.play import Mismatch, Play, variants
from tests.conformance.real import stream_from_smollm2
from tests.conformance.schema import load, suites
from tests.conformance.stage import RefusingStage, Stage
from tests.conformance.testee import Testee, TesteeError, languages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KNOWN_FAILING = Path(__file__).parent / "known_failing"
BESIDE = 3
"""Suites that are played at the same time: each has a server of its own, and mostly waits."""


def known_failing(language: str) -> dict[str, str]:
    """Return the scenarios that are known to fail, with the reason of each."""
    with suppress(FileNotFoundError):
        lines = (KNOWN_FAILING / f"{language}.txt").read_text().splitlines()
        pairs = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
        return {pair[0]: pair[1] for pair in pairs}
    return {}


def play_suites(testee: Testee, report: Callable[[str, str, float], None], only: str = "") -> None:
    """Play all suites, some at a time; `report` name, what went wrong ("" for nothing), seconds.

    Raises TesteeError when the testee is of no more use.
    """

    def play(name: str, suite: Any) -> None:
        plays = [
            (f"{name}/{variant}", scenario, replaced)
            for scenario in suite.scenarios
            for variant, replaced in variants(scenario)
        ]
        plays = [one for one in plays if only in one[0]]
        if not plays:
            return
        with (
            tempfile.TemporaryDirectory(prefix="conformance-") as folder,
            _stage(suite, folder) as stage,
        ):
            for title, scenario, replaced in plays:
                began = time.monotonic()
                problem = ""
                try:
                    stage.settle()
                    Play(stage, testee, replaced).run(scenario.steps)
                except (Mismatch, TimeoutError) as error:
                    problem = str(error)
                report(title, problem, time.monotonic() - began)

    loaded = [(file.stem, load(file)) for file in suites()]
    # What waits longest goes first, so that nobody waits for it in the end.
    loaded.sort(key=lambda one: one[0] != "silence")
    with ThreadPoolExecutor(BESIDE) as pool:
        for future in [pool.submit(play, *one) for one in loaded]:
            future.result()


def _stage(suite: Any, folder: str) -> Any:
    return RefusingStage() if suite.server.refusing else Stage(Path(folder, "stage"), suite.server)


def run_language(testee: Testee, only: str) -> bool:
    """Build a testee and play all suites; return whether all is as it should be."""
    language = testee.language
    known = known_failing(language)
    counts = {"passed": 0, "failed": 0, "known": 0}

    def report(name: str, problem: str, seconds: float) -> None:
        state, why = "passed", ""
        if problem:
            state, why = "known" if name in known else "failed", f": {problem}"
        elif name in known:
            state, why = "failed", ": it passes; take it off the list"
        counts[state] += 1
        print(f"{state:6} {language} {name} ({seconds:.1f} s){why}", flush=True)

    try:
        testee.build()
        with testee:
            play_suites(testee, report, only)
    except TesteeError as error:
        print(f"{language}: FAILED, {error}", flush=True)
        return False
    print(f"{language}: {', '.join(f'{count} {word}' for word, count in counts.items())}")
    return not counts["failed"]


def run_real(testees: Sequence[Testee]) -> bool:
    """Stream from a real model with every SDK; return whether all did."""
    good = True
    for testee, problem, seconds in stream_from_smollm2(testees):
        state, why = ("failed", f": {problem}") if problem else ("passed", "")
        print(f"{state:6} {testee.language} real model ({seconds:.1f} s){why}", flush=True)
        good &= not problem
    return good


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang", nargs="+", default=languages(), choices=languages())
    parser.add_argument("--only", default="", help="scenarios whose name holds this")
    parser.add_argument("--show", action="store_true", help="print the lines of the testee")
    arguments = parser.parse_args()
    good, testees = True, []
    for language in arguments.lang:
        testee = Testee(language, show=arguments.show)
        if missing := testee.missing():
            verdict = "FAILED" if os.environ.get("CI") == "true" else "skipped"
            print(f"{language}: {verdict}, not on PATH: {', '.join(missing)}", flush=True)
            good &= verdict == "skipped"
        elif run_language(testee, arguments.only):
            testees.append(testee)
        else:
            good = False
    if testees and not arguments.only:
        good &= run_real(testees)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
