"""`mbnorm bench`."""

from pathlib import Path
from typing import Annotated

import typer

from mbnorm.experiments.bench.cases import DTYPES, PROVIDERS
from mbnorm.experiments.bench.run import bench as run_bench
from mbnorm.experiments.commands.options import choices, numbers

QUICK_TO_PREPARE = [name for name in PROVIDERS if name != "compiled_batch_norm"]


def bench(
    out: Annotated[
        Path, typer.Option(help="Folder for bench.jsonl, bench.md and bench.png.", metavar="FOLDER")
    ] = Path("runs/bench"),
    providers: Annotated[
        str,
        typer.Option(
            help=f"Layers, comma-separated: {', '.join(PROVIDERS)}. batch_norm is always among them.",
            metavar="LIST",
            show_default="all but compiled_batch_norm, which takes a minute a shape",
        ),
    ] = ",".join(QUICK_TO_PREPARE),
    dtypes: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join(DTYPES)}.", metavar="LIST")
    ] = "float32,bfloat16",
    threads: Annotated[
        str, typer.Option(help="Numbers of threads, comma-separated.", metavar="LIST")
    ] = "1,2",
    quick: Annotated[bool, typer.Option("--quick", help="Three shapes and few rounds.")] = False,
) -> None:
    """Time the layers and whole training steps beside torch's own, on the CPU.

    Every BatchNorm2d shape of ResNet-50 at 224 pixels and batch 2, and some of BatchNorm1d and 3d, in both
    layouts; each layer is checked against a float64 copy first, and all are timed in turns. The rows with the
    machine and the versions go to bench.jsonl; the table and the plot are made from these.
    """
    chosen = list(dict.fromkeys(["batch_norm", *choices("--providers", providers, list(PROVIDERS))]))
    try:
        run_bench(
            out,
            threads=numbers("--threads", threads, int),
            providers=chosen,
            dtypes=choices("--dtypes", dtypes, list(DTYPES)),
            quick=quick,
        )
    except (ArithmeticError, RuntimeError) as error:
        typer.echo(f"mbnorm: {error}", err=True)
        raise typer.Exit(1) from None
