"""The commands that docs/clients.md prints, by the comment above each."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
HEADING = "## Tools that nobody here wrote\n"
PLAIN, SECURE = "127.0.0.1:50151", "lowbit.example:50151"
"""Addresses that stand there for a server, and for one with TLS and tokens."""

_COMMAND = re.compile(r"^# (.+)\n((?:[^#\n].*\n)+)", re.MULTILINE)


def shell() -> str:
    """Return all shell blocks of the section."""
    section = PAGE.read_text().split(HEADING)[1].split("\n## ")[0]
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL))


def commands() -> dict[str, str]:
    """Return each command; every line of the blocks belongs to one."""
    text = shell()
    rest = _COMMAND.sub("", text).strip()
    assert not rest, f"nobody says what this is: {rest}"
    return dict(_COMMAND.findall(text))
