"""`mbnorm train`."""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbnorm.experiments.commands.options import (
    ACCELERATORS,
    DATA_NAMES,
    above_0,
    at_least_1,
    check_accelerator,
    choice,
    net_name,
    shares,
)
from mbnorm.experiments.grid import Run, Setting, default_epochs, linear_rate
from mbnorm.experiments.losses import LOSSES
from mbnorm.experiments.methods import METHODS, batches_a_step
from mbnorm.experiments.models import MODELS
from mbnorm.experiments.plan import RECIPES, Plan, Recipe
from mbnorm.experiments.progress import prepare_kernels
from mbnorm.experiments.sampling import SAMPLINGS
from mbnorm.experiments.training import RATE_DROPS

if TYPE_CHECKING:
    from mbnorm.experiments.resumable import Training

SECONDS_BETWEEN_LOOKS = 0.5
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true")


def train(
    model: Annotated[
        str, typer.Option(help=f"The net: {', '.join(MODELS)}, timm:NAME.", metavar="NAME")
    ] = "mlp",
    data: Annotated[
        str,
        typer.Option(
            help=f"The data to train on: {DATA_NAMES}.",
            metavar="NAME",
        ),
    ] = "digits",
    method: Annotated[
        str, typer.Option(help=f"The normalization method: {', '.join(METHODS)}.", metavar="NAME")
    ] = "matched",
    batch_size: Annotated[int, typer.Option(help="Images m of a forward, on each process.", metavar="M")] = 2,
    accumulate: Annotated[int, typer.Option(help="Batches of an optimizer step.", metavar="N")] = 1,
    sampling: Annotated[
        str, typer.Option(help=f"How batches are drawn: {', '.join(SAMPLINGS)}.", metavar="NAME")
    ] = "shuffled",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="eccv2020-cifar: the ECCV 2020 paper's for CIFAR, 200 epochs of SGD at 0.1 m/64, divided by "
            "10 after each 60. The options below override it.",
            metavar="NAME",
            show_default="none",
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of training.", metavar="N", show_default="mlp 10, others 8")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of SGD.", metavar="RATE", show_default="0.1 for each 64 images of a step"
        ),
    ] = None,
    drops: Annotated[
        str | None,
        typer.Option(
            help="Shares of the training after which the rate is divided by 10, comma-separated.",
            metavar="LIST",
            show_default=",".join(map(str, RATE_DROPS)),
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="The loss; dice adds the overlaps of classes to cross-entropy, for small classes.",
            metavar="|".join(LOSSES),
        ),
    ] = "cross-entropy",
    seed: Annotated[
        int, typer.Option(help="The seed of the initial weights and of the order of images.", metavar="N")
    ] = 0,
    precision: Annotated[
        str, typer.Option(help=f"Lightning Fabric's: {', '.join(PRECISIONS)}.", metavar="NAME")
    ] = "32-true",
    accelerator: Annotated[str, typer.Option(help="Where to train.", metavar="|".join(ACCELERATORS))] = "cpu",
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints within an epoch.", metavar="SECONDS", min=0)
    ] = 60.0,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for checkpoint.pt, log.jsonl, curves.png and tensorboard.", metavar="FOLDER"
        ),
    ] = Path("runs/train"),
) -> None:
    """Train a net with one normalization method, and measure it after each epoch.

    If it is stopped, the same command goes on from its checkpoint and comes to the same numbers. For several
    processes: torchrun --nproc-per-node 2 -m mbnorm train, with the same options.
    """
    known = Recipe(default_epochs(model), RATE_DROPS)
    if recipe is not None:
        known = RECIPES[choice("--recipe", recipe, list(RECIPES))]
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    at_least_1("--batch-size", batch_size)
    at_least_1("--accumulate", accumulate)
    chosen_method = choice("--method", method, METHODS)
    batches = accumulate * batches_a_step(chosen_method, batch_size)
    setting = Setting(
        net_name("--model", model),
        batch_size,
        choice("--sampling", sampling, SAMPLINGS),
        linear_rate(batch_size * batches * ranks) if lr is None else above_0("--lr", lr),
        known.epochs if epochs is None else at_least_1("--epochs", epochs),
        data,
        choice("--loss", loss, list(LOSSES)),
    )
    plan = Plan(
        Run(chosen_method, setting, seed),
        known.drops if drops is None else tuple(shares("--drops", drops)),
        accumulate,
        choice("--precision", precision, PRECISIONS),
    )
    check_accelerator(accelerator)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    _train(plan, accelerator, ranks, checkpoint_every, out)


def _train(plan: Plan, accelerator: str, ranks: int, checkpoint_every: float, out: Path) -> None:
    from lightning_fabric import Fabric

    from mbnorm.experiments.journal import told
    from mbnorm.experiments.loop import fit
    from mbnorm.experiments.resumable import Training

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fabric = Fabric(
        accelerator=accelerator,
        devices=here,
        num_nodes=ranks // here,
        strategy="ddp" if ranks > 1 else "auto",
        precision=plan.precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    if ranks > 1:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    if accelerator == "cpu":
        prepare_kernels([plan.run.method])
    try:
        training = Training(plan, fabric, out)
    except ValueError as error:
        typer.echo(f"mbnorm: {error}", err=True)
        raise typer.Exit(2) from None
    if fabric.is_global_zero:
        typer.echo(f"{plan.run}: step {training.step} of {training.total_steps}")
    try:
        with told(training, out) as (stepped, ended):
            fit(training, checkpoint_every, stepped, ended)
    except KeyboardInterrupt:
        if fabric.is_global_zero:
            typer.echo(f"interrupted: {_stored(training)}", err=True)
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        typer.echo(f"mbnorm: {reason}: {_stored(training)}", err=True)
        raise typer.Exit(1) from None
    if fabric.is_global_zero:
        names = ("log.jsonl", "curves.png", "tensorboard")
        typer.echo(f"written: {', '.join(map(str, (training.path, *(out / name for name in names))))}")


def _end_with(launcher: int) -> None:
    """End the process as soon as torchrun is gone: nobody else would, were it killed."""
    while os.getppid() == launcher:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _stored(training: "Training") -> str:
    if training.saved_step is None:
        return "nothing is saved yet"
    return (
        f"step {training.saved_step} of {training.total_steps} is in {training.path}, "
        "and the same command continues from there"
    )
