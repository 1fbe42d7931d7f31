"""The pictures of a run: how it learned, what a step costs, what became of each layer."""

import io
import json
import textwrap
from pathlib import Path
from typing import Any

from sparseprop.checkpoint import atomic_write
from sparseprop.swap.plan import LayerPlan
from sparseprop.train.checkpoint import read_text
from sparseprop.train.report import FinetuneResult

__all__ = ["write_plots"]

_INK, _FAINT = "#222222", "#d9d9d9"
_COLOURS = {"pretrain": "#8c8c8c", "prune": "#e69f00", "dense": "#0072b2", "sparse": "#009e73"}
_TITLES = {
    "pretrain": "pretraining",
    "prune": "gradual pruning",
    "dense": "dense fine-tuning",
    "sparse": "sparse fine-tuning",
}


def write_plots(folder: Path, result: FinetuneResult) -> None:
    """Write ``training.png``, ``step_time.png`` and ``layers.png`` into ``folder``.

    Needs matplotlib; raises `SparsePropError` when a file cannot be written.
    """
    lines = read_text(folder / "metrics.jsonl").splitlines()
    for name, figure in (
        ("training", _training([json.loads(line) for line in lines])),
        ("step_time", _step_time(result)),
        ("layers", _layers(result)),
    ):
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(picture.getvalue())


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure  # no pyplot: it would start a backend and keep figures alive

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
    return figure


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=9)


def _training(records: list[dict[str, Any]]) -> Any:
    figure = _figure(9.5, 6.0, "Training")
    top, bottom = figure.subplots(2, 1, sharex=True)
    start = 0
    for phase in dict.fromkeys(record["phase"] for record in records):
        own = [record for record in records if record["phase"] == phase]
        train, test = ([r for r in own if r["kind"] == kind] for kind in ("train", "test"))
        colour = _COLOURS[phase]
        top.plot([start + r["step"] for r in train], [r["loss"] for r in train], color=colour, linewidth=1.2)
        bottom.plot(
            [start + r["step"] for r in test],
            [100 * r["accuracy"] for r in test],
            color=colour,
            marker="o",
            markersize=3.5,
            label=f"{_TITLES[phase]} ({100 * test[-1]['accuracy']:.1f} %)" if test else _TITLES[phase],
        )
        if start:
            for axes in (top, bottom):
                axes.axvline(start, color=_FAINT, linewidth=1, linestyle="--", zorder=0)
        start += max(record["step"] for record in own)
    top.set_ylabel("training loss")
    bottom.set_ylabel("held-out accuracy (%)")
    bottom.set_xlabel("training step, over all phases")
    for axes in (top, bottom):
        _tidy(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _step_time(result: FinetuneResult) -> Any:
    step = result.step
    figure = _figure(
        7.0, 3.6, f"One training step, batch of {step.batch_size}: {step.speedup:.2f}x dense speed"
    )
    axes = figure.subplots()
    bars = (
        ("dense, NCHW", "dense_nchw", step.dense_nchw_ms, "#9ecae1"),
        ("dense, channels last", "dense_channels_last", step.dense_channels_last_ms, _COLOURS["dense"]),
        (f"sparse, {100 * result.sparsity:.0f} % zeros", "sparse", step.sparse_ms, _COLOURS["sparse"]),
    )
    for row, (label, key, median, colour) in enumerate(bars):
        axes.barh(row, median, color=colour, height=0.62, label=label)
        times = step.rounds_ms[key]
        axes.plot(times, [row] * len(times), "|", color=_INK, alpha=0.45, markersize=9)
    widest = max(max(times) for times in step.rounds_ms.values())
    for row, (_, key, median, _) in enumerate(bars):
        axes.text(
            max(step.rounds_ms[key]) + 0.015 * widest, row, f"{median:.1f} ms", va="center", fontsize=10
        )
    axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.2)
    axes.set_xlabel(f"milliseconds (bar: median; ticks: all {step.rounds} rounds, run in turn)", fontsize=9)
    _tidy(axes)
    axes.grid(visible=False, axis="y")
    return figure


def _layers(result: FinetuneResult) -> Any:
    layers = list(result.plan)
    figure = _figure(12.5, 1.1 + 0.3 * (len(layers) + 1), "Layers")
    axes = figure.subplots()
    axes.axis("off")
    header = ["layer", "kind", "weight", "zeros", "runs", "dense ms", "sparse ms", "reason"]
    table = axes.table(
        [_cells(layer) for layer in layers],
        colLabels=header,
        cellLoc="left",
        colLoc="left",
        colWidths=[0.17, 0.06, 0.11, 0.06, 0.06, 0.07, 0.08, 0.39],
        bbox=[0, 0, 1, 1],
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor(_FAINT)
        cell.visible_edges = "B"
        if row == 0:
            cell.set_text_props(fontweight="bold")
        elif column == 4 and layers[row - 1].choice == "sparse":
            cell.set_text_props(color=_COLOURS["sparse"], fontweight="bold")
        if column in (3, 5, 6):
            cell.set_text_props(ha="right")
    return figure


def _cells(layer: LayerPlan) -> list[str]:
    return [
        layer.name or "(model)",
        layer.kind,
        "x".join(map(str, layer.shape)),
        "" if layer.sparsity is None else f"{100 * layer.sparsity:.1f} %",
        layer.choice,
        "" if layer.dense_ms is None else f"{layer.dense_ms:.2f}",
        "" if layer.sparse_ms is None else f"{layer.sparse_ms:.2f}",
        textwrap.shorten(layer.reason, 60, placeholder=" ..."),
    ]
