"""The commands of `mbnorm`: options to values, and one line for each wrong one."""

from typing import Annotated

import typer

from mbnorm.experiments.commands import bench, claim, compare, diagnose, train
from mbnorm.versions import describe

app = typer.Typer(pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(describe())
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print versions and usable backends."
        ),
    ] = False,
) -> None:
    """Batch normalization that works at batch sizes 1 to 8: see it at work."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in (compare.compare, train.train, diagnose.diagnose, claim.claim, bench.bench):
    app.command()(command)
