"""What ``sparseprop mask`` and ``sparseprop convert`` share: their table, files and last line."""

from pathlib import Path

import typer

from sparseprop.cli.options import check_file
from sparseprop.conversion import ConversionReport
from sparseprop.conversion.plot import write_plot
from sparseprop.errors import SparsePropError

__all__ = ["check_out", "show_report"]


def check_out(out: Path, plot: Path | None) -> None:
    """Refuse early what could not be written at the end, or has another ending than what is written."""
    for path, suffix in ((out, ".safetensors"), (plot, ".png")):
        if path is None:
            continue
        if path.suffix != suffix:
            raise SparsePropError(f"the output {path} got another ending; expected {suffix}; rename it")
        check_file(path)


def show_report(report: ConversionReport, out: Path, plot: Path | None, *, as_json: bool) -> None:
    """Print the table (or JSON) and write the picture."""
    if plot is not None:
        write_plot(report, plot)
    if as_json:
        typer.echo(report.to_json())
        return
    typer.echo(str(report))
    typer.echo(f"written to {out}" + (f" and {plot}" if plot else ""))
