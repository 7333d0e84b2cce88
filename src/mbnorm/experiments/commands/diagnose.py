"""`mbnorm diagnose`."""

from pathlib import Path
from typing import Annotated

import typer

from mbnorm.experiments.commands.options import DATA_NAMES, at_least_1, check_batch_fits, choice, net_name
from mbnorm.experiments.diagnose import SYNTHETIC_NAME, batches_of, net, source
from mbnorm.experiments.diagnose import write as write_diagnosis
from mbnorm.experiments.methods import METHODS, WITHOUT_BATCH_NORM
from mbnorm.experiments.models import MODELS, why_not
from mbnorm.experiments.progress import prepare_kernels
from mbnorm.experiments.sampling import SAMPLINGS


def diagnose(
    model: Annotated[
        str, typer.Option(help=f"The net: {', '.join(MODELS)}, timm:NAME.", metavar="NAME")
    ] = "mlp",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Its weights: a file of torch.save with a state_dict, or one under 'state_dict' or 'model'.",
            metavar="FILE",
            show_default="untrained",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(help=f"The normalization method: {', '.join(METHODS)}.", metavar="NAME"),
    ] = "batch",
    data: Annotated[
        str,
        typer.Option(
            help=f"The data: {DATA_NAMES}, or synthetic: Gaussian fields whose neighbors correlate by 0.8.",
            metavar="NAME",
        ),
    ] = "digits",
    batch_size: Annotated[int, typer.Option(help="The batch size that is trained with.", metavar="M")] = 2,
    sampling: Annotated[
        str, typer.Option(help=f"How batches are drawn: {', '.join(SAMPLINGS)}.", metavar="NAME")
    ] = "shuffled",
    batches: Annotated[int, typer.Option(help="Batches to look at.", metavar="N")] = 100,
    loss: Annotated[
        bool,
        typer.Option(
            "--loss",
            help=(
                "Also measure what the noise of each layer adds to the cross-entropy, for a trained net: "
                "2 L + 3 more forwards of 32 batches for L layers."
            ),
            show_default="without",
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for table.txt, diagnose.json and diagnose.png.", metavar="FOLDER")
    ] = Path("runs/diagnose"),
) -> None:
    """Measure whether a net suffers from small batches, layer by layer, and say what would help.

    For a net and data of your own call mbnorm.diagnose(model, batches).
    """
    if batches < 2:
        raise typer.BadParameter(f"expected at least 2, got {batches}", param_hint="--batches")
    try:
        read = source(data)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    why = why_not(net_name("--model", model), read)
    if why is not None:
        raise typer.BadParameter(f"{why}: {data}", param_hint="--model")
    chosen_method = choice("--method", method, METHODS)
    if chosen_method in WITHOUT_BATCH_NORM:
        raise typer.BadParameter(f"{method!r} leaves no batch norm to look at", param_hint="--method")
    if loss and data == SYNTHETIC_NAME:
        raise typer.BadParameter("synthetic data have no classes", param_hint="--loss")
    chosen_sampling = choice("--sampling", sampling, SAMPLINGS)
    at_least_1("--batch-size", batch_size)
    if data != SYNTHETIC_NAME:
        check_batch_fits(batch_size, chosen_sampling, data, "--batch-size")
    try:
        built = net(model, chosen_method, batch_size, checkpoint, data)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    drawn = data if data == SYNTHETIC_NAME else f"{data}, {sampling}"
    weights = "untrained" if checkpoint is None else str(checkpoint)
    title = f"{model} with {method} layers, {weights}; {drawn}, {batches} batches of {batch_size}"
    prepare_kernels([method])
    given = batches_of(data, chosen_sampling, batch_size, batches)
    try:
        found, paths = write_diagnosis(built, given, batches, title, out, with_loss=loss)
    except ValueError as error:
        # an image that cannot be decoded, a net without batch norms
        typer.echo(f"mbnorm: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{title}\n\n{found}\n\nwritten: {', '.join(map(str, paths))}")
