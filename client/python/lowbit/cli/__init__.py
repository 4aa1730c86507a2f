"""The command `lowbit`; needs the extra `cli` (typer and rich)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 well, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        from lowbit.cli.app import run  # noqa: PLC0415 - the extra may be missing

        code = run(arguments)
    except KeyboardInterrupt:
        code = 130
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        sys.exit("lowbit: error: the command needs more packages: pip install 'lowbit[cli]'")
    sys.exit(code)
