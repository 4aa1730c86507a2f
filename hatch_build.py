"""Compiles the kernels when the package is built; where that fails, torch does their work."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = "service/lowbit_server/kernels"
LIBRARY = f"{KERNELS}/kernels.so"
# Without traps and errno loops with choices and roots become vectors; no bit changes.
FLAGS = ("-O3", "-fno-trapping-math", "-fno-math-errno", "-fopenmp", "-fPIC")


class CustomBuildHook(BuildHookInterface[Any]):
    """Puts the library beside its sources, for editable installs and wheels alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile all sources into one library and add it to a wheel."""
        folder = Path(self.root, KERNELS)
        library = Path(self.root, LIBRARY)
        objects = [file.with_suffix(".o") for file in sorted(folder.glob("*.c"))]
        library.unlink(missing_ok=True)
        try:
            for file in objects:
                self._cc(*FLAGS, "-c", file.with_suffix(".c"), "-o", file)
            # Without -fopenmp: a second runtime beside torch's would fight for the cores.
            self._cc("-shared", *objects, "-o", library)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", None) or error
            self.app.display_warning(f"the kernels were not compiled, torch does it all: {why}")
            return
        finally:
            for file in objects:
                file.unlink(missing_ok=True)
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _cc(self, *arguments: str | Path) -> None:
        subprocess.run(["cc", *arguments], check=True, capture_output=True, text=True)  # noqa: S603, S607
