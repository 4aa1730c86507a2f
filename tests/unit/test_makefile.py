"""What is missing on a machine is skipped by name, and an error in CI."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {
    "client-go": "go",
    "generate-go": "go",
    "checkgenerate-go": "go",
    "clients": "go",
    "client-typescript": "npm",
    "build-typescript": "npm",
    "generate-typescript": "npm",
    "checkgenerate-typescript": "npm",
    "client-java": "JDK or Maven",
    "client-rust": "cargo",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with what make itself needs and no toolchain."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("find", "python3"):
        program = shutil.which(name)
        assert program is not None
        (folder / name).symlink_to(program)
    return str(folder)


def test_every_rule_is_listed() -> None:
    files = [*ROOT.glob("client/*/client.mk"), ROOT / "tests" / "clients" / "client.mk"]
    rule = re.compile(r"^(.+):\n\t\$\(call missing", re.MULTILINE)
    found = " ".join(targets for file in files for targets in rule.findall(file.read_text()))
    assert sorted(found.split()) == sorted(NEEDS)


def make(target: str, path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("make")
    assert program is not None
    return subprocess.run(
        [program, "--no-print-directory", target],
        cwd=ROOT,
        env={"PATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("target", "program"), NEEDS.items())
def test_a_missing_toolchain_is_skipped_by_name(target: str, program: str, path: str) -> None:
    done = make(target, path)
    assert done.returncode == 0
    assert done.stderr == f"skipped {target}: {program} is not installed\n"


@pytest.mark.parametrize(("target", "program"), NEEDS.items())
def test_in_ci_it_is_an_error(target: str, program: str, path: str) -> None:
    done = make(target, path, CI="true")
    assert done.returncode != 0
    assert f"skipped {target}: {program} is not installed\n" in done.stderr


@pytest.mark.parametrize(("ci", "verdict", "code"), [("", "skipped", 0), ("true", "FAILED", 1)])
def test_the_conformance_suite_does_the_same(ci: str, verdict: str, code: int, path: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.conformance.run", "--lang", "go"],
        cwd=ROOT,
        env={"PATH": path, "CI": ci},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == f"go: {verdict}, not on PATH: go\n", done.stderr
    assert done.returncode == code


@pytest.mark.parametrize("there", ["javac", "mvn"])
def test_java_needs_a_jdk_and_maven(there: str, path: str, tmp_path: Path) -> None:
    (tmp_path / there).symlink_to("/bin/sh")
    done = make("client-java", f"{path}:{tmp_path}")
    assert done.stderr == "skipped client-java: JDK or Maven is not installed\n"
