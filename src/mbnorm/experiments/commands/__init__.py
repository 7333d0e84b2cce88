"""The commands of `mbnorm`: options to values, and one line for each wrong one."""

from typing import Annotated

import typer

from mbnorm import __version__
from mbnorm.experiments.commands import bench, claim, compare, diagnose

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mbnorm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch normalization that works at batch sizes 1 to 8: see it at work."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (compare.compare, bench.bench, diagnose.diagnose, claim.claim):
    app.command()(command)
