"""`mbnorm diagnose`."""

from pathlib import Path
from typing import Annotated

import typer

from mbnorm.experiments.commands.options import at_least_1, check_batch_fits, choice
from mbnorm.experiments.diagnose import DATA, batches_of, net
from mbnorm.experiments.diagnose import write as write_diagnosis
from mbnorm.experiments.methods import METHODS, WITHOUT_BATCH_NORM
from mbnorm.experiments.models import MODELS
from mbnorm.experiments.sampling import SAMPLINGS


def diagnose(
    model: Annotated[str, typer.Option(help="The net.", metavar="|".join(MODELS))] = "mlp",
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
        typer.Option(help=f"What its norms are: {', '.join(METHODS)}.", metavar="NAME"),
    ] = "batch",
    data: Annotated[
        str,
        typer.Option(help="digits, or synthetic: Gaussian fields whose neighbors correlate by 0.8."),
    ] = "digits",
    batch_size: Annotated[int, typer.Option(help="The batch size that is trained with.", metavar="M")] = 2,
    sampling: Annotated[
        str, typer.Option(help="How digits are drawn.", metavar="|".join(SAMPLINGS))
    ] = "shuffled",
    batches: Annotated[int, typer.Option(help="Batches to look at.", metavar="N")] = 100,
    out: Annotated[
        Path, typer.Option(help="Folder for table.txt, diagnose.json and diagnose.png.", metavar="FOLDER")
    ] = Path("runs/diagnose"),
) -> None:
    """Measure whether a net suffers from small batches, layer by layer, and say what would help.

    For a net and data of your own call mbnorm.diagnose(model, batches).
    """
    if batches < 2:
        raise typer.BadParameter(f"expected at least 2, got {batches}", param_hint="--batches")
    chosen_data = choice("--data", data, DATA)
    chosen_model = choice("--model", model, MODELS)
    chosen_method = choice("--method", method, METHODS)
    if chosen_method in WITHOUT_BATCH_NORM:
        raise typer.BadParameter(f"{method!r} leaves no batch norm to look at", param_hint="--method")
    chosen_sampling = choice("--sampling", sampling, SAMPLINGS)
    at_least_1("--batch-size", batch_size)
    if chosen_data == "digits":
        check_batch_fits(batch_size, chosen_sampling, "digits", "--batch-size")
    try:
        built = net(chosen_model, chosen_method, batch_size, checkpoint)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    drawn = f"{data}, {sampling}" if chosen_data == "digits" else data
    weights = "untrained" if checkpoint is None else str(checkpoint)
    title = f"{model} with {method} layers, {weights}; {drawn}, {batches} batches of {batch_size}"
    given = batches_of(chosen_data, chosen_sampling, batch_size, batches)
    found, paths = write_diagnosis(built, given, title, out)
    typer.echo(f"{title}\n\n{found}\n\nwritten: {', '.join(map(str, paths))}")
