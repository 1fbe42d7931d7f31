"""What ``sparseprop mask`` and ``sparseprop convert`` share: their table, files and last line."""

from pathlib import Path

import typer

from sparseprop.conversion import ConversionReport
from sparseprop.conversion.plot import write_plot
from sparseprop.errors import SparsePropError

__all__ = ["check_out", "show_report"]


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
    typer.echo(str(report))
    typer.echo(f"written to {out}" + (f" and {plot}" if plot else ""))
