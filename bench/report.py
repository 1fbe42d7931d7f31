"""Turn the JSON of a run into a Markdown report with plots: `python bench/report.py out.json [folder]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plots import draw_all
from rows import Results, Row, load
from sparseprop import SparsePropError
from summary import AIMS, at_limit, choices, crossovers, geometric_mean, slower_than_dense, speedups

INTRO = (
    "Forward and backward of one layer with bias and input gradient, float32, medians. Dense is the faster "
    "of torch's layouts, run in turn with sparse. *At the limit* a layer would cost its arithmetic or its "
    "memory traffic, whichever is more, and the call of an autograd function that does nothing."
)


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the rest are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share: float | None) -> str:
    """A share as a short percentage."""
    return "" if share is None else f"{100 * share:.3g} %"


def times(factor: float | None) -> str:
    """A factor with its sign."""
    return "" if factor is None else f"{factor:.3g}x"


def machine(results: Results) -> str:
    """What ran where."""
    own: dict[str, Any] = results.machine.get("sparseprop", {})
    brand = results.machine.get("cpu", {}).get("brand_raw", "unknown CPU")
    versions = ", ".join(f"{name} {version}" for name, version in own.get("versions", {}).items())
    memory = own.get("memory_gbs") or [[0, 0.0]]
    lines = [
        f"{brand}, {own.get('cores')} cores, {own.get('threads')} used, {own.get('isa')}; {versions}, "
        f"Python {results.machine.get('python_version')}, {results.machine.get('system')}.",
        f"Limits ({own.get('limits_from')}): {own.get('fma_gflops', 0):.0f} GF/s; "
        f"{memory[-1][1]:.0f} GB/s from memory, {memory[0][1]:.0f} GB/s from the nearest cache measured.",
    ]
    if own.get("clock") == "cpu":
        lines.append(
            "Times are CPU time of one thread: waiting for others does not count, sharing memory does."
        )
    elif own.get("busy"):
        lines.append(
            f"**The machine was busy** (others used {percent(own['others'])} of it, load {own['load']:.1f}): "
            "ratios are of runs taken in turn, but do not quote these numbers."
        )
    return "\n\n".join(lines)


def means(results: Results) -> str:
    """Geometric means by sparsity, each with the aim, what no layer could beat, and the slowest shape."""
    found, most = speedups(results.of("layer")), at_limit(results)
    columns = sorted({sparsity for by in found.values() for sparsity in by})
    body = []
    for group, by in found.items():
        aims = AIMS.get(group, {})
        count = max(mean.count for mean in by.values())
        body.append([f"{group} ({count} shapes)", *(times(by[s].value) if s in by else "" for s in columns)])
        body.append([f"{group}, fastest runs", *(times(by[s].best) if s in by else "" for s in columns)])
        if aims:
            body.append([f"{group}, aim", *(times(aims.get(s)) for s in columns)])
        if most.get(group):
            body.append([f"{group}, at the limit", *(times(most[group].get(s)) for s in columns)])
        body.append([f"{group}, worst", *(times(by[s].worst.speedup) if s in by else "" for s in columns)])
    worst = [
        [group, percent(sparsity), mean.worst.shape, times(mean.worst.speedup)]
        for group, by in found.items()
        for sparsity, mean in by.items()
    ]
    return (
        table(["speed over dense", *map(percent, columns)], body)
        + "\n\nSlowest shapes:\n\n"
        + table(["group", "sparsity", "shape", "speed-up"], worst)
    )


def layer_lines(rows: Iterable[Row]) -> str:
    """One line for each layer and sparsity."""
    head = ["layer", "sparsity", "dense ms", "channels_last ms", "sparse ms", "spread", "speed-up"]
    head += ["quartiles", "batch-last ms", "GF/s", "of limit", "error", "plan"]
    body = []
    for row in rows:
        low, high = row.speedup_range or (0.0, 0.0)
        shown = (row.ms.get(name) for name in ("dense", "dense channels_last", "sparse"))
        cells = ["" if ms is None else f"{ms:.3g}" for ms in shown]
        last = row.ms.get("sparse batch_last")
        body.append(
            [
                *(row.shape, percent(row.sparsity), *cells, percent(row.spread.get("sparse"))),
                *(times(row.speedup), f"{low:.3g}-{high:.3g}", "" if last is None else f"{last:.3g}"),
                *(f"{row.gflops or 0:.0f}", percent(row.of_limit), f"{row.error or 0:.0e}", row.plan),
            ]
        )
    return table(head, body)


def candidates(rows: Sequence[Row], what: str, last: str = "") -> str:
    """One line for each row, one column for the milliseconds of each candidate."""
    names = list(dict.fromkeys(name for row in rows for name in row.ms))
    body = []
    for row in rows:
        cells = ["" if name not in row.ms else f"{row.ms[name]:.3g}" for name in names]
        end = [times(row.speedup)] if last else []
        body.append([" ".join([row.shape, row.variant]).strip(), percent(row.sparsity), *cells, *end])
    head = [what, "sparsity", *(f"{name}, ms" for name in names), *([last] if last else [])]
    return table(head, body)


def nm_lines(rows: Sequence[Row]) -> str:
    """N:M beside dense and random patterns of equal density, and geometric means by pattern."""
    head = ["layer", "dense, ms", "unstructured, ms", "N:M, ms", "N:M over dense", "over unstructured"]
    body, gains = [], dict[str, list[tuple[float, float]]]()
    for row in rows:
        dense, random, ours = (row.ms[name] for name in ("dense", "unstructured", "N:M"))
        gain = dense / ours, random / ours
        body.append([row.shape, *(f"{ms:.3g}" for ms in (dense, random, ours)), *map(times, gain)])
        gains.setdefault(f"{row.group}, {row.pattern}", []).append(gain)
    for name, all_gains in gains.items():
        mean = (times(geometric_mean(each)) for each in zip(*all_gains, strict=True))
        body.append([f"{name} ({len(all_gains)} shapes)", "", "", "", *mean])
    return table(head, body)


def contractions(rows: Iterable[Row]) -> str:
    """Each contraction as a share of its limit."""
    body = [
        [
            *(row.shape, percent(row.sparsity), row.variant, f"{row.ms[row.variant]:.3g}"),
            *(percent(row.spread[row.variant]), f"{row.gflops:.0f}", f"{row.limit_gflops:.0f}"),
            *(percent(row.of_limit), f"{row.error:.0e}"),
        ]
        for row in rows
    ]
    head = ["layer", "sparsity", "contraction", "ms", "spread", "GF/s", "limit GF/s", "of limit", "error"]
    return table(head, body)


def patterns(rows: Iterable[Row]) -> str:
    """Speed per non-zero of uneven patterns, of that of a random one."""
    body = [
        [row.shape, percent(row.sparsity), row.pattern, row.nnz, times(row.speedup), f"{row.error:.0e}"]
        for row in rows
    ]
    head = ["layer", "sparsity", "pattern", "non-zeros", "speed per non-zero, random = 1", "error"]
    return table(head, body)


def crossing(results: Results) -> str:
    """The break-even sparsity of each shape."""
    body = []
    for shape, (sparsity, exact) in crossovers(results.of("layer")).items():
        text = "never" if sparsity is None else percent(sparsity) if exact else f"below {percent(sparsity)}"
        body.append([shape, text])
    return table(["layer", "break-even sparsity"], body)


def verdict(results: Results) -> str:
    """Whether anything that becomes sparse loses, and how well the unmeasured plan chooses."""
    lost = slower_than_dense(results)
    plan = choices(results.of("layer"))
    lines = [f"{row.shape} at {percent(row.sparsity)}: {times(row.speedup)} ({row.plan})" for row in lost]
    told = "; ".join(lines) or "none"
    worst = "" if plan.worst is None else f", the worst of {plan.worst.shape} {plan.cost:.2f} times too slow"
    return (
        f"Slower than dense where the plan without measurement says sparse, or at 90 % and more: {told}.\n\n"
        f"That plan is right in {plan.right} of {plan.of} cases{worst}."
    )


def render(results: Results, images: Iterable[str]) -> str:
    """The whole report; `images` are file names beside it."""
    layers = results.of("layer")
    parts = [("Machine", machine(results))]
    if layers:
        parts += [("Speed over dense torch", means(results)), ("Never slower", verdict(results))]
    sections = [
        ("Contractions alone", "contraction", contractions),
        ("Uneven patterns", "pattern", patterns),
        ("N:M", "nm", nm_lines),
        ("Threads", "threads", lambda rows: candidates(rows, "layer", "most over one")),
        ("Instruction sets", "isa", lambda rows: candidates(rows, "layer", "best over first")),
        (
            "bfloat16 under autocast",
            "bfloat16",
            lambda rows: candidates(rows, "layer", "bfloat16 over float32"),
        ),
        ("Peers", "peers", lambda rows: candidates(rows, "layer", "sparse over dense")),
        ("Fixed cost of a call", "overhead", lambda rows: candidates(rows, "layer")),
    ]
    parts += [(title, make(results.of(family))) for title, family, make in sections if results.of(family)]
    if layers:
        parts += [("Break-even", crossing(results)), ("All layers", layer_lines(layers))]
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in parts)
    shown = "\n\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in images)
    return f"# Benchmarks\n\n{INTRO}\n\n{text}\n\n{shown}\n"


def write(source: Path, folder: Path) -> Path:
    """Write report.md and its plots into `folder`; returns the report's path."""
    results = load(source)
    folder.mkdir(parents=True, exist_ok=True)
    images = [path.name for path in draw_all(results, folder)]
    target = folder / "report.md"
    target.write_text(render(results, images))
    return target


def main(arguments: Sequence[str]) -> int:
    """Command line; 2 for a wrong call or file."""
    if not 1 <= len(arguments) <= 2:
        print("usage: report.py RESULTS.json [FOLDER]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    try:
        target = write(source, Path(arguments[1]) if len(arguments) == 2 else source.parent)
    except SparsePropError as error:
        print(error, file=sys.stderr)
        return 2
    print(target.read_text().partition("## All layers")[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
