"""Tokens a second that each SDK reads, with 1 and 32 streams.

    python benchmarks/clients.py [--json FILE] [LANG ...]

The scripted engine makes tokens as fast as it can, so server and SDK share the machine and
a figure is that of both: compare within one table. Each SDK brings a program that takes
ADDRESS MODEL STREAMS TOKENS and prints {"tokens": n, "seconds": s}; `throughput.toml` in
its folder says how it is made and started, as `testee.toml` does for the conformance suite.
The languages take turns, round after round; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowbit import Client
from lowbit_server.testing import ServerProcess, scripted_model

CLIENTS = Path(__file__).parents[1] / "client"
LANGUAGES = ("python", "typescript", "go", "java", "rust")
TOKENS = {1: 20_000, 32: 2_000}
"""Tokens of each stream, by the number of streams."""
ROUNDS = 5
TIMEOUT_S = 300.0


class Program:
    """An SDK's program."""

    def __init__(self, language: str) -> None:
        """Read how it is made."""
        self.folder = CLIENTS / language
        file = self.folder / "throughput.toml"
        self._spec = tomllib.loads(file.read_text()) if file.exists() else {}

    def missing(self) -> str:
        """Return what it lacks; empty when it can be built."""
        if not self._spec:
            return "it has no throughput.toml"
        lacking = [name for name in self._spec["needs"] if shutil.which(name) is None]
        return f"not on PATH: {', '.join(lacking)}" if lacking else ""

    def build(self) -> None:
        """Build it; raise CalledProcessError when that fails."""
        for command in self._spec.get("build", []):
            subprocess.run(command, cwd=self.folder, check=True)  # noqa: S603 - the SDK's own

    def run(self, address: str, streams: int) -> float:
        """Return its tokens a second."""
        command = [sys.executable if one == "$python" else one for one in self._spec["run"]]
        command += [address, "flood", str(streams), str(TOKENS[streams])]
        done = subprocess.run(  # noqa: S603 - the SDK's own
            command, cwd=self.folder, check=True, stdout=subprocess.PIPE, timeout=TIMEOUT_S
        )
        figures = json.loads(done.stdout)
        if figures["tokens"] != streams * TOKENS[streams]:
            message = f"{self.folder.name} read {figures['tokens']} tokens"
            raise SystemExit(message)
        return float(figures["tokens"] / figures["seconds"])


def measure(programs: dict[str, Program]) -> dict[str, dict[int, float]]:
    """Return the median tokens a second of each language, by the number of streams."""
    rates: defaultdict[str, defaultdict[int, list[float]]]
    rates = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as folder:
        source = scripted_model(Path(folder, "source"), step_ms=0, context_tokens=100_000)
        # No SDK is to be ended as stalled: how fast it reads is what is asked.
        environment = {"LOWBIT_IMPORT_ROOTS": folder, "LOWBIT_STREAM_BUFFER_TOKENS": "1048576"}
        with ServerProcess(Path(folder, "home"), environment=environment) as server:
            with Client(server.address) as client:
                client.wait_job(client.import_model("flood", path=str(source)).id)
                client.load("flood").wait()
            for turn in range(1 + ROUNDS):
                for language, program in programs.items():
                    for streams in TOKENS:
                        rate = program.run(server.address, streams)
                        if turn:  # the first is the warm-up
                            rates[language][streams].append(rate)
    return {
        language: {streams: statistics.median(found) for streams, found in by_streams.items()}
        for language, by_streams in rates.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("languages", nargs="*", default=LANGUAGES, metavar="LANG")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    programs = {}
    for language in args.languages:
        program = Program(language)
        if lacking := program.missing():
            print(f"{language}: missing, {lacking}", file=sys.stderr)
            if os.environ.get("CI") == "true":
                raise SystemExit(1)
            continue
        program.build()
        programs[language] = program
    figures = measure(programs)
    table = Table("SDK", *(f"{streams} at once" for streams in TOKENS), title="tokens a second")
    for language, rates in figures.items():
        table.add_row(language, *(f"{rates[streams]:,.0f}" for streams in TOKENS))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
