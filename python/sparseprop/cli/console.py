"""How commands speak: one clear sentence for an error, bars on a terminal, plain lines in a log."""

import errno
import functools
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Protocol, Self, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sparseprop._table import table_lines
from sparseprop.errors import SparsePropError
from sparseprop.train.loop import Progress as News

__all__ = ["View", "guarded", "make_view", "show_table"]

REFUSED, INTERRUPTED = 2, 130
P = ParamSpec("P")
R = TypeVar("R")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command that turns what a user did wrong into one sentence on stderr and exit status 2."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except SparsePropError as error:
            typer.echo(f"sparseprop: {error}", err=True)
            raise typer.Exit(REFUSED) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            typer.echo(
                "sparseprop: a file or folder got a name that is too long; choose a shorter one", err=True
            )
            raise typer.Exit(REFUSED) from None
        except KeyboardInterrupt:
            typer.echo("sparseprop: stopped", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run


def show_table(columns: dict[str, bool], rows: list[list[str]]) -> None:
    """Print a table; ``columns`` says which headings hold numbers. Never cut, nor read as markup."""
    right = {index for index, is_number in enumerate(columns.values()) if is_number}
    typer.echo("\n".join(table_lines(list(columns), rows, right)))


class View(Protocol):
    """Shows the progress of a job; used as a context."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def __call__(self, news: News) -> None: ...


def make_view() -> View:
    """Bars if standard error is a terminal, else lines."""
    return _Bars() if sys.stderr.isatty() else _Lines()


class _Lines:
    def __enter__(self) -> Self:
        self.start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, news: News) -> None:
        clock = f"{time.monotonic() - self.start:7.1f} s"
        if news.message:
            typer.echo(f"{clock}  {news.phase:<9} {news.message}", err=True)
        elif news.accuracy is not None:
            typer.echo(
                f"{clock}  {news.phase:<9} step {news.step:>5}/{news.steps}  held-out loss {news.loss:.3f}  "
                f"accuracy {100 * news.accuracy:5.2f} %",
                err=True,
            )


class _Bars:
    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, TaskID] = {}
        self.accuracy = ""

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def __call__(self, news: News) -> None:
        if news.phase not in self.tasks:
            self.tasks[news.phase] = self.bars.add_task(news.phase, total=news.steps, note="")
            self.accuracy = ""
        if news.accuracy is not None:
            self.accuracy = f"  accuracy {100 * news.accuracy:.1f} %"
        note = news.message or f"loss {news.loss:.3f}" + self.accuracy
        if news.sparsity is not None:
            note += f"  zeros {100 * news.sparsity:.0f} %"
        self.bars.update(self.tasks[news.phase], completed=news.step, note=note)
