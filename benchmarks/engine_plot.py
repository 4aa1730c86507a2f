"""The picture of what `benchmarks.engine` has measured.

python -m benchmarks.engine_plot FIGURES.json OUT.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, OTHERS = "#0072b2", "#9a9a9a"


def draw(figures: dict, path: Path) -> None:
    """Draw tokens a second of all systems, one panel a cell, into a PNG file."""
    systems = figures["systems"]
    cells = list(next(iter(systems.values()))["cells"])
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"SmolLM2-135M, {figures['processors']} cores of {figures['processor']}: tokens a second"
    )
    for axes, cell in zip(figure.subplots(2, 3).flat, cells, strict=True):
        names = list(reversed(systems))
        speeds = [systems[name]["cells"][cell]["tokens/s"] for name in names]
        colours = [OURS if name.startswith("lowbit") else OTHERS for name in names]
        bars = axes.barh(names, speeds, color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        kind, size = cell.split()
        streams = "1 stream" if size == "1" else f"{size} streams"
        axes.set_title(streams if kind == "decode" else f"prompt of {size} tokens", fontsize=10)
        axes.set_xlim(0, 1.15 * max(speeds))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
