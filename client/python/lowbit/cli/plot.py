"""The picture of a comparison: what each model loses for its size and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_MIB = 2**20
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4b8a", "#7f7f7f")
_RADIUS = 6
# Where a label may stand beside its point, in points, and which of its edges are there.
_PLACES: tuple[tuple[int, int, str, str], ...] = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (9, 9, "left", "bottom"),
    (9, -9, "left", "top"),
    (-9, 9, "right", "bottom"),
    (-9, -9, "right", "top"),
)


def draw(rows: list[dict[str, Any]], base: str, path: Path) -> None:
    """Draw size and decode speed against mean KL divergence into a PNG file.

    `rows` are the objects of `lowbit compare --json`.
    """
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(
        f"Quality lost against {base}, by size and by speed\n"
        f"{rows[0]['tokens']} tokens of held-out text on {rows[0]['device']}",
        fontsize=12,
    )
    left.set_xlabel("size on disk, MiB  (left is smaller)")
    right.set_xlabel("decode speed of one stream, tokens/s  (right is faster)")
    left.set_ylabel("mean KL divergence, nats  (down is better)")
    losses = [row["mean_kl"] for row in rows]
    sizes = [row["disk_bytes"] / _MIB for row in rows]
    speeds = [row["decode_tokens_per_second"] for row in rows]
    for axes, values in ((left, sizes), (right, speeds)):
        _scatter(axes, values, losses)
    canvas.draw()  # type: ignore[no-untyped-call]  # labels need the final places of the points
    for axes, values in ((left, sizes), (right, speeds)):
        _label(axes, [row["model"] for row in rows], list(zip(values, losses, strict=True)))
    figure.savefig(path, format="png")


def _scatter(axes: Axes, values: Sequence[float], losses: Sequence[float]) -> None:
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(values))]
    axes.scatter(values, losses, s=(2 * _RADIUS) ** 2 / 2, color=colours, zorder=3)
    top = max(losses) or 1.0
    axes.set_xlim(0, 1.2 * max(values))
    axes.set_ylim(-0.08 * top, 1.12 * top)
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, where it covers no other name or point."""
    radius = _RADIUS * axes.figure.dpi / 72
    centres = [tuple(axes.transData.transform(point)) for point in points]
    taken = [Bbox.from_bounds(x - radius, y - radius, 2 * radius, 2 * radius) for x, y in centres]
    inside = axes.get_window_extent()
    for name, point in zip(names, points, strict=True):
        for x, y, side, edge in _PLACES:
            style: dict[str, Any] = {"ha": side, "va": edge, "fontsize": 10, "zorder": 4}
            label = axes.annotate(name, point, (x, y), textcoords="offset points", **style)
            box = label.get_window_extent()
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1
            if (fits and not box.count_overlaps(taken)) or (x, y, side, edge) == _PLACES[-1]:
                taken.append(box)
                break
            label.remove()
