"""Wheels carry the kernels where they can be compiled, and are whole without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KERNELS = Path("service", "lowbit_server", "kernels")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a wheel with nothing but the kernels is built from."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / KERNELS, project / KERNELS, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "hatch_build.py", ".gitignore"):
        shutil.copyfile(ROOT / name, project / name)
    return project


def wheel(project: Path, path: str) -> tuple[str, set[str], str]:
    """Build a wheel; return its name, its files of the kernels, and what was said."""
    made = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        cwd=project,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    (file,) = (project / "dist").iterdir()
    names = zipfile.ZipFile(file).namelist()
    return file.name, {Path(name).name for name in names if "/kernels/" in name}, made.stderr


@pytest.mark.skipif(not shutil.which("cc"), reason="needs cc")
def test_the_library_is_in_the_wheel(project: Path) -> None:
    name, files, _ = wheel(project, os.environ["PATH"])
    assert "kernels.so" in files
    assert not any(file.endswith(".o") for file in files)
    assert "linux" in name or "macosx" in name


def test_without_a_compiler_there_is_none(project: Path, tmp_path: Path) -> None:
    (project / KERNELS / "kernels.so").write_text("of an earlier build")
    name, files, said = wheel(project, str(tmp_path))
    assert "gram.py" in files
    assert "kernels.so" not in files
    assert name.endswith("-py3-none-any.whl")
    assert "the kernels were not compiled" in said


@pytest.mark.skipif(not shutil.which("cc"), reason="needs cc")
def test_what_does_not_compile_is_told(project: Path) -> None:
    (project / KERNELS / "broken.c").write_text("int broken(")
    name, files, said = wheel(project, os.environ["PATH"])
    assert "kernels.so" not in files
    assert name.endswith("-py3-none-any.whl")
    assert "broken.c" in said
