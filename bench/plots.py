"""Plots of a report, as PNG files: speed by sparsity, roofline, threads, instruction sets, break-even."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rows import Results, Row
from summary import AIMS, crossovers, speedups

COLOURS = ("#2a6f97", "#e07a1f", "#5b8e3e", "#8e4a8c", "#7a7a7a", "#c23b3b")
STYLE = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draw what the rows allow; returns the files in the report's order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        return [path for draw in PLOTS for path in draw(results, folder, pyplot)]


def _saved(figure: Any, folder: Path, name: str, pyplot: Any) -> Path:
    path = folder / f"{name}.png"
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return path


def _label(axis: Any, ticks: Sequence[float], text: Callable[[float], str]) -> None:
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _by_density(sparsity: float) -> float:
    return 1 / (1 - sparsity)


def speed_by_sparsity(results: Results, folder: Path, pyplot: Any) -> Iterator[Path]:
    """Geometric mean of each group over thin lines of its shapes, with the aim."""
    found = speedups(results.of("layer"))
    if not found:
        return
    figure, axes = pyplot.subplots(
        1, len(found), figsize=(4.4 * len(found), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (group, by), colour in zip(axes[0], found.items(), COLOURS, strict=False):
        for line in _lines(row for row in results.of("layer") if row.group == group):
            axis.plot(
                [_by_density(s) for s, _ in line], [v for _, v in line], color=colour, alpha=0.25, lw=0.8
            )
        means = [(_by_density(s), mean.value) for s, mean in by.items()]
        axis.plot(*zip(*means, strict=True), "o-", color=colour, lw=2.2, label="geometric mean")
        for x, y in means:
            axis.annotate(
                f"{y:.1f}", (x, y), textcoords="offset points", xytext=(-4, 7), ha="right", color=colour
            )
        aims = [(_by_density(s), aim) for s, aim in AIMS.get(group, {}).items() if s in by]
        if aims:
            axis.plot(*zip(*aims, strict=True), "_", color="#333333", ms=14, mew=2, label="aim")
        axis.axhline(1, color="#333333", lw=1, ls=":")
        axis.set(xscale="log", yscale="log", title=group, xlabel="sparsity")
        _label(axis.xaxis, [_by_density(s) for s in by], lambda x: _percent(round(1 - 1 / x, 4)))
        axis.margins(x=0.12)
        axis.tick_params(axis="x", labelsize=8)
        axis.legend(loc="upper left")
    _label(axes[0][0].yaxis, [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128], lambda y: f"{y:g}x")
    axes[0][0].set_ylabel("speed over dense, forward + backward")
    yield _saved(figure, folder, "speed_by_sparsity", pyplot)


def _lines(rows: Iterator[Row]) -> list[list[tuple[float, float]]]:
    shapes: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.speedup is not None:
            shapes.setdefault(row.shape, []).append((row.sparsity, row.speedup))
    return [sorted(line) for line in shapes.values()]


def roofline(results: Results, folder: Path, pyplot: Any) -> Iterator[Path]:
    """Rates over intensity: contractions alone and whole layers, below what the machine allows."""
    own = results.machine.get("sparseprop", {})
    kinds: dict[str, list[Row]] = {}
    for row in (*results.of("layer"), *results.of("contraction")):
        if row.gflops and row.intensity:
            kinds.setdefault(row.variant or row.group, []).append(row)
    if not kinds or not own.get("memory_gbs"):
        return
    figure, axis = pyplot.subplots(figsize=(7.6, 4.8), layout="constrained")
    least = min(row.intensity for rows in kinds.values() for row in rows if row.intensity)
    most = max(row.intensity for rows in kinds.values() for row in rows if row.intensity)
    peak, memory = own["fma_gflops"], own["memory_gbs"]
    grid = [least / 2 * (4 * most / least) ** (i / 200) for i in range(201)]
    for (size, rate), style in ((memory[0], "--"), (memory[-1], "-")):
        label = f"{rate:.0f} GB/s, {size / 2**20:g} MiB"
        axis.plot(grid, [min(peak, rate * x) for x in grid], color="#333333", ls=style, lw=1.4, label=label)
    for index, (kind, rows) in enumerate(sorted(kinds.items())):
        alone = rows[0].family == "contraction"
        axis.scatter(
            [row.intensity for row in rows],
            [row.gflops for row in rows],
            s=44 if alone else 16,
            marker="D^vs"[index % 4] if alone else "o",
            color=COLOURS[index % len(COLOURS)],
            alpha=0.9 if alone else 0.5,
            label=f"{kind} alone" if alone else kind,
            linewidths=0,
        )
    axis.set(
        xscale="log",
        yscale="log",
        title=f"Reached and possible ({peak:.0f} GF/s)",
        xlabel="operations on non-zeros per byte moved once",
        ylabel="GF/s on non-zeros",
    )
    axis.legend(fontsize=8, loc="lower right")
    yield _saved(figure, folder, "roofline", pyplot)


def _bars(rows: list[Row], title: str, text: str, pyplot: Any) -> Any:
    """Grouped bars: speed of each setting over the first one, for each layer."""
    names = list(rows[0].ms)
    figure, axis = pyplot.subplots(figsize=(1.6 + 1.5 * len(rows), 3.8), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [row.ms[names[0]] / row.ms[name] for row in rows]
        places = [i + (index - (len(names) - 1) / 2) * width for i in range(len(rows))]
        bars = axis.bar(places, heights, width * 0.92, color=COLOURS[index % len(COLOURS)], label=name)
        axis.bar_label(bars, fmt="%.2g", fontsize=8, padding=2)
    labels = [f"{row.shape.replace(', ', chr(10))}\n{_percent(row.sparsity)}" for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.grid(visible=False, axis="x")
    axis.set(title=title, ylabel=text)
    axis.margins(y=0.15)
    axis.legend(ncols=len(names), loc="upper left", bbox_to_anchor=(0, -0.2), fontsize=8)
    return figure


def settings(results: Results, folder: Path, pyplot: Any) -> Iterator[Path]:
    """Thread scaling and instruction sets."""
    for family, title in (("threads", "Threads"), ("isa", "Instruction sets")):
        rows = [row for row in results.of(family) if row.sparsity == 0.9]
        if rows:
            first = next(iter(rows[0].ms))
            figure = _bars(rows, title, f"speed, {first} = 1", pyplot)
            yield _saved(figure, folder, family, pyplot)


def break_even(results: Results, folder: Path, pyplot: Any) -> Iterator[Path]:
    """The sparsity from which each shape is faster than dense."""
    found = crossovers(results.of("layer"))
    if not found:
        return
    shown = sorted(found.items(), key=lambda item: 1.0 if item[1][0] is None else item[1][0], reverse=True)
    figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.19 * len(shown)), layout="constrained")
    for place, (_, (sparsity, exact)) in enumerate(shown):
        never = sparsity is None
        colour = COLOURS[5] if never else COLOURS[0] if exact else COLOURS[2]
        marker = "X" if never else "o" if exact else "<"
        axis.plot(1.0 if sparsity is None else sparsity, place, marker, color=colour, ms=6)
    axis.set_yticks(range(len(shown)), [shape for shape, _ in shown], fontsize=8)
    axis.set_ylim(-1, len(shown))
    axis.set_xlim(0.2, 1.02)
    axis.xaxis.set_major_formatter(lambda x, _: _percent(round(x, 3)))
    axis.set(title="Break-even with dense", xlabel="sparsity (<: faster already there, x: never)")
    yield _saved(figure, folder, "break_even", pyplot)


PLOTS = (speed_by_sparsity, roofline, settings, break_even)
