"""A step profile as a picture: stacked bars, dense beside sparse."""

import io
from pathlib import Path
from typing import Any

from sparseprop.checkpoint import atomic_write
from sparseprop.profiling.report import PARTS, LayerTimes, StepProfile

__all__ = ["draw"]

_INK, _FAINT = "#222222", "#d9d9d9"
_COLOURS = dict(zip(PARTS, ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#8c8c8c"), strict=True))
_MOST_LAYERS = 40


def draw(profile: StepProfile, path: Path) -> None:
    """Write the picture, by kind of layer on the left and the costliest layers on the right."""
    from matplotlib.figure import Figure  # no pyplot: it would start a backend and keep figures alive

    kinds = profile.by_kind()[:14]
    costly = sorted(profile.layers, key=lambda layer: -layer.dense.total - layer.sparse.total)[:_MOST_LAYERS]
    layers = [layer for layer in profile.layers if layer in costly]
    height = 1.8 + 0.3 * max(len(layers), 2 * len(kinds))
    figure = Figure(figsize=(14.0, height), layout="constrained", facecolor="white")
    figure.suptitle(
        f"{profile.model}, input {'x'.join(map(str, profile.input_shape))}, {profile.threads} threads: "
        f"{profile.dense.step_ms:.0f} ms dense, {profile.sparse.step_ms:.0f} ms sparse, "
        f"{profile.speedup:.2f}x dense speed",
        fontsize=12,
        fontweight="bold",
        color=_INK,
    )
    left, right = figure.subplots(1, 2)
    _bars(left, kinds, [f"{row.name} {row.kind}" for row in kinds], "by kind of layer")
    _bars(right, layers, [layer.name or "(model)" for layer in layers], "by layer, the costliest")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    with atomic_write(path) as temporary:
        temporary.write_bytes(picture.getvalue())


def _bars(axes: Any, rows: "tuple[LayerTimes, ...] | list[LayerTimes]", names: list[str], title: str) -> None:
    """Two bars a row: dense above, pale; sparse below."""
    for side, offset, alpha in (("dense", -0.2, 0.45), ("sparse", 0.2, 1.0)):
        starts = [0.0] * len(rows)
        for part in PARTS:
            widths = [getattr(getattr(row, side), part) for row in rows]
            label = part.replace("_", " ") if side == "sparse" else None
            places = [place + offset for place in range(len(rows))]
            axes.barh(places, widths, 0.38, left=starts, color=_COLOURS[part], alpha=alpha, label=label)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{title} (above, pale: dense; below: sparse)", fontsize=10, color=_INK)
    axes.set_xlabel("milliseconds of a step", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
