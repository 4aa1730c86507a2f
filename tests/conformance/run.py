"""Runs the conformance suite: `python -m tests.conformance.run --lang go`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.conformance.play import Mismatch, Play, variants
from tests.conformance.schema import load, suites
from tests.conformance.stage import RefusingStage, Stage
from tests.conformance.testee import Testee, TesteeError, languages

if TYPE_CHECKING:
    from collections.abc import Iterator

KNOWN_FAILING = Path(__file__).parent / "known_failing"


def known_failing(language: str) -> dict[str, str]:
    """Return the scenarios that are known to fail, with the reason of each."""
    with suppress(FileNotFoundError):
        lines = (KNOWN_FAILING / f"{language}.txt").read_text().splitlines()
        pairs = [line.split(": ", 1) for line in lines if line and not line.startswith("#")]
        return {pair[0]: pair[1] for pair in pairs}
    return {}


def play_suite(file: Path, testee: Testee, only: str = "") -> Iterator[tuple[str, str, float]]:
    """Play a file's scenarios; yield name, what went wrong ("" for nothing) and seconds."""
    suite = load(file)
    plays = [
        (f"{file.stem}/{name}", scenario, replaced)
        for scenario in suite.scenarios
        for name, replaced in variants(scenario)
    ]
    plays = [one for one in plays if only in one[0]]
    if not plays:
        return
    with (
        tempfile.TemporaryDirectory(prefix="conformance-") as folder,
        _stage(suite, folder) as stage,
    ):
        for name, scenario, replaced in plays:
            began = time.monotonic()
            problem = ""
            try:
                stage.settle()
                Play(stage, testee, replaced).run(scenario.steps)
            except (Mismatch, TimeoutError) as error:
                problem = str(error)
            yield name, problem, time.monotonic() - began


def _stage(suite: Any, folder: str) -> Any:
    return RefusingStage() if suite.server.refusing else Stage(Path(folder, "stage"), suite.server)


def run_language(language: str, *, only: str, show: bool) -> bool:
    """Run all suites against one language's testee; return whether all is as it should be."""
    testee = Testee(language, show=show)
    if missing := testee.missing():
        verdict = "FAILED" if os.environ.get("CI") == "true" else "skipped"
        print(f"{language}: {verdict}, not on PATH: {', '.join(missing)}", flush=True)
        return verdict == "skipped"
    testee.build()
    known = known_failing(language)
    counts = {"passed": 0, "failed": 0, "known": 0}
    with testee:
        for file in suites():
            for name, problem, seconds in play_suite(file, testee, only):
                state, why = "passed", ""
                if problem:
                    state, why = "known" if name in known else "failed", f": {problem}"
                elif name in known:
                    state, why = "failed", ": it passes; take it off the list"
                counts[state] += 1
                print(f"{state:6} {language} {name} ({seconds:.1f} s){why}", flush=True)
    print(f"{language}: {', '.join(f'{count} {word}' for word, count in counts.items())}")
    return not counts["failed"]


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lang", default="all", choices=["all", *languages()])
    parser.add_argument("--only", default="", help="scenarios whose name holds this")
    parser.add_argument("--show", action="store_true", help="print the lines of the testee")
    arguments = parser.parse_args()
    chosen = languages() if arguments.lang == "all" else [arguments.lang]
    good = True
    for language in chosen:
        try:
            good &= run_language(language, only=arguments.only, show=arguments.show)
        except TesteeError as error:
            print(f"{language}: FAILED, {error}", flush=True)
            good = False
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
