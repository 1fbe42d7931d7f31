"""What ``sparseprop mask`` and ``sparseprop convert`` share: their table, files and last line."""

from pathlib import Path

import typer

from sparseprop.cli.console import show_table
from sparseprop.conversion import ConversionReport, LayerReport
from sparseprop.conversion.plot import write_plot
from sparseprop.errors import SparsePropError

__all__ = ["check_out", "show_report"]

_COLUMNS = {
    "layer": False,
    "shape": False,
    "pattern": False,
    "was": True,
    "density": True,
    "retained": True,
    "error masked": True,
    "error fitted": True,
    "note": False,
}


def check_out(out: Path, plot: Path | None) -> None:
    """Refuse early, before minutes of work, what could not be written at the end."""
    for path, suffix in ((out, ".safetensors"), (plot, ".png")):
        if path is None:
            continue
        if path.suffix != suffix:
            raise SparsePropError(f"the output {path} got another ending; expected {suffix}; rename it")
        if not path.parent.is_dir():
            raise SparsePropError(f"the folder {path.parent} is missing; make it first")


def show_report(report: ConversionReport, out: Path, plot: Path | None, *, as_json: bool) -> None:
    """Print the table (or JSON) and write the picture."""
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        typer.echo(report.to_json())
        return
    show_table(_COLUMNS, [_row(layer) for layer in report])
    typer.echo(str(report).splitlines()[-1])
    typer.echo(f"written to {out}" + (f" and {plot}" if plot else ""))


def _row(layer: LayerReport) -> list[str]:
    return [
        layer.name or "(model)",
        "x".join(map(str, layer.shape)),
        layer.pattern or "-",
        _percent(layer.density_before),
        _percent(layer.density),
        _percent(layer.retained),
        _number(layer.error_masked),
        _number(layer.error),
        layer.reason,
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
