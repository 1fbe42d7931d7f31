"""The picture of a conversion: what each layer kept, and what that did to its outputs."""

import io
import os
from typing import Any

from sparseprop.checkpoint import atomic_write
from sparseprop.conversion.report import ConversionReport
from sparseprop.errors import SparsePropError

__all__ = ["write_plot"]

_INK, _FAINT = "#222222", "#d9d9d9"
_BEFORE, _AFTER, _KEPT = "#e69f00", "#009e73", "#0072b2"


def write_plot(report: ConversionReport, path: str | os.PathLike[str]) -> None:
    """Write a PNG with the retained magnitude and the output errors of each converted layer.

    Needs matplotlib; raises SparsePropError where it is missing or the file cannot be written.

    >>> import tempfile, torch, sparseprop
    >>> report = sparseprop.convert(torch.nn.Linear(8, 8), "2:4", [torch.randn(32, 8)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_plot(report, f"{folder}/report.png")
    """
    picture = io.BytesIO()
    _drawn(report).savefig(picture, format="png", dpi=150)
    with atomic_write(path) as temporary:
        temporary.write_bytes(picture.getvalue())


def _drawn(report: ConversionReport) -> Any:
    try:
        from matplotlib.figure import Figure  # no pyplot: it would start a backend and keep figures alive
    except ImportError as error:
        raise SparsePropError("plots need matplotlib; run `pip install matplotlib`.") from error
    layers = [layer for layer in report if layer.converted]
    figure = Figure(figsize=(9.5, 1.6 + 0.32 * len(layers)), layout="constrained", facecolor="white")
    title = f"Conversion to {report.pattern} by {report.score}"
    figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(layers))
    left.barh(rows, [100 * (layer.retained or 0.0) for layer in layers], color=_KEPT, height=0.6)
    left.plot([100 * (layer.density or 0.0) for layer in layers], rows, "|", color=_INK, markersize=11)
    left.set_xlabel("magnitude kept (%); tick: weights kept")
    left.set_xlim(0, 100)
    left.set_yticks(rows, [f"{layer.name or '(model)'}  {layer.pattern}" for layer in layers])
    left.invert_yaxis()
    for offset, colour, label, errors in (
        (-0.2, _BEFORE, "masked", [layer.error_masked for layer in layers]),
        (0.2, _AFTER, "after least squares", [layer.error for layer in layers]),
    ):
        known = [(row + offset, error) for row, error in zip(rows, errors, strict=True) if error is not None]
        if known:
            right.barh(*zip(*known, strict=True), color=colour, height=0.36, label=label)
    right.set_xlabel("mean square error of the outputs, relative")
    if right.patches:
        right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color=_FAINT, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, labelsize=9)
    return figure
