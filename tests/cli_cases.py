"""A command line as a user gives it, without a process of its own."""

from typer.testing import CliRunner

from sparseprop.cli import app


def call(command: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    done = CliRunner().invoke(app, command.split())
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr
