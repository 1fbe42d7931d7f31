"""The command line: ``sparseprop finetune``, ``plan``, ``profile``, ``mask``, ``convert``,
``inspect`` and ``info``."""

import typer

from sparseprop.cli.convert import convert
from sparseprop.cli.finetune import finetune
from sparseprop.cli.info import info
from sparseprop.cli.inspect import inspect
from sparseprop.cli.mask import mask
from sparseprop.cli.plan import plan
from sparseprop.cli.profile import profile
from sparseprop.memory import keep_freed_memory

__all__ = ["app", "main"]

app = typer.Typer(
    name="sparseprop",
    help="Train neural networks with sparse weights, fast, on ordinary CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (finetune, plan, profile, mask, convert, inspect, info):
    app.command()(command)


def main() -> None:
    """The console entry point."""
    keep_freed_memory()
    app()
