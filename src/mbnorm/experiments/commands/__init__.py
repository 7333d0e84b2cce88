"""The commands of `mbnorm`: options to values, and one line for each wrong one."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from mbnorm.backends import cpu
from mbnorm.experiments.commands import compare, diagnose, train
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
    """Batch normalization that works at batch sizes 1 to 8, measured.

    First steps, in this order:

    1. mbnorm --version: which kernels run here.

    2. mbnorm compare: all methods side by side on small nets, in some 3 minutes.

    3. mbnorm diagnose --model resnet18 --data folder:PATH: are small batches of your images too noisy?

    4. mbnorm train --model resnet18 --data folder:PATH: train a net on them with Matched BN.

    5. In your own code: mbnorm.convert(model), before training from scratch.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            # new typers make a silent exit of it
            typer.echo("mbnorm: interrupted", err=True)
            raise typer.Exit(130) from None

    return run


def _help(command: Callable[..., None]) -> str:
    # typer keeps the line ends within a paragraph
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))


def build() -> None:
    """Compile the CPU kernels now, rather than at the first forward.

    Needed once on a machine, and not with a wheel that has the kernels inside.
    """
    if reason := cpu.build():
        raise typer.BadParameter(reason)
    typer.echo("the CPU kernels are ready")


for command in (compare.compare, train.train, diagnose.diagnose, build):
    app.command(help=_help(command))(_interruptible(command))
