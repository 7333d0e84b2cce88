"""The commands of `mbnorm`: options to values, and one line for each wrong one."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from mbnorm import __version__
from mbnorm.experiments.bench.cases import DTYPES, PROVIDERS
from mbnorm.experiments.bench.run import bench as run_bench
from mbnorm.experiments.claims.command import claim
from mbnorm.experiments.compare import report, train_missing
from mbnorm.experiments.data import SAMPLINGS, Sampling, largest_batch
from mbnorm.experiments.diagnose import DATA, batches_of, net
from mbnorm.experiments.diagnose import write as write_diagnosis
from mbnorm.experiments.grid import (
    SEEDS,
    SUITES,
    Run,
    Setting,
    grid_settings,
    runs_of,
    suite_runs,
    suite_settings,
)
from mbnorm.experiments.methods import METHODS, WITHOUT_BATCH_NORM
from mbnorm.experiments.models import MODELS
from mbnorm.experiments.results import Results

Choice = TypeVar("Choice", bound=str)
Number = TypeVar("Number", int, float)

ACCELERATORS = ("cpu", "cuda", "mps")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(claim)


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


@app.command()
def compare(
    suite: Annotated[
        str,
        typer.Option(
            help="quick: an MLP on batches of 2 at lr 0.025, a CNN on one-class batches of 4, and for "
            "reference batch norm on batches of 64. full: these, and the MLP on batches of m = 1 to 64 at "
            "lr 0.1 m/64.",
            metavar="|".join(SUITES),
        ),
    ] = "quick",
    methods: Annotated[
        str,
        typer.Option(
            help=f"Methods, comma-separated: {', '.join(METHODS)}.", metavar="LIST", show_default="all"
        ),
    ] = ",".join(METHODS),
    seeds: Annotated[
        int | None,
        typer.Option(help="Train from seeds 0 to N-1.", metavar="N", show_default="2, with --suite full 3"),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Grid: batch sizes m, comma-separated.", metavar="LIST", show_default="2"),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="Grid: how batches are drawn, comma-separated: shuffled, one-class (all images of a batch "
            "are of one class).",
            metavar="LIST",
            show_default="shuffled",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Grid: nets, comma-separated: mlp, cnn.", metavar="LIST", show_default="mlp"),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Grid: epochs of training.", metavar="N", show_default="mlp 10, cnn 8"),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Grid: learning rates, comma-separated.", metavar="LIST", show_default="0.1 m/64 at each m"
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for results.jsonl, table.md and compare.png.", metavar="FOLDER")
    ] = Path("runs/compare"),
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time, a process each.", metavar="N", show_default="number of cores"),
    ] = None,
    accelerator: Annotated[
        str,
        typer.Option(
            help="Where to train; nets this small gain nothing from a GPU.", metavar="|".join(ACCELERATORS)
        ),
    ] = "cpu",
) -> None:
    """Train small nets on digits with each normalization method: who survives small batches, and who loses.

    The settings are those of --suite. If any option marked Grid is given, they are all combinations of the
    Grid options instead, those not given at their defaults.

    A result is stored as soon as its run ends. Stop with Ctrl-C; the same command, or another that shares
    runs with it, trains only what is not in the folder yet.
    """
    chosen_suite = _choice("--suite", suite, SUITES)
    chosen_methods = _choices("--methods", methods, METHODS)
    seeds = _at_least_1("--seeds", SEEDS[chosen_suite] if seeds is None else seeds)
    jobs = _at_least_1("--jobs", (os.cpu_count() or 1) if jobs is None else jobs)
    _check_accelerator(accelerator)
    if (batch_sizes, sampling, model, epochs, lr) == (None,) * 5:
        settings = suite_settings(chosen_suite)
        runs = suite_runs(chosen_suite, chosen_methods, seeds)
    else:
        settings = grid_settings(
            _choices("--model", "mlp" if model is None else model, MODELS),
            _numbers("--batch-sizes", "2" if batch_sizes is None else batch_sizes, int),
            _choices("--sampling", "shuffled" if sampling is None else sampling, SAMPLINGS),
            None if lr is None else _numbers("--lr", lr, float),
            None if epochs is None else _at_least_1("--epochs", epochs),
        )
        _check_batches_fit(settings)
        runs = runs_of(settings, chosen_methods, seeds)
    results = _results_in(out)
    try:
        _compare(settings, runs, results, out, jobs, accelerator)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {_stored(runs, results)}", err=True)
        raise typer.Exit(130) from None
    except BrokenProcessPool:
        typer.echo(f"a process died, for want of memory perhaps: {_stored(runs, results)}", err=True)
        raise typer.Exit(1) from None


@app.command()
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
    ] = ",".join(name for name in PROVIDERS if name != "compiled_batch_norm"),
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
    chosen = list(dict.fromkeys(["batch_norm", *_choices("--providers", providers, list(PROVIDERS))]))
    try:
        run_bench(
            out,
            threads=_numbers("--threads", threads, int),
            providers=chosen,
            dtypes=_choices("--dtypes", dtypes, list(DTYPES)),
            quick=quick,
        )
    except (ArithmeticError, RuntimeError) as error:
        typer.echo(f"mbnorm: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
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
    chosen_data = _choice("--data", data, DATA)
    chosen_model = _choice("--model", model, MODELS)
    chosen_method = _choice("--method", method, METHODS)
    if chosen_method in WITHOUT_BATCH_NORM:
        raise typer.BadParameter(f"{method!r} leaves no batch norm to look at", param_hint="--method")
    chosen_sampling = _choice("--sampling", sampling, SAMPLINGS)
    _at_least_1("--batch-size", batch_size)
    if chosen_data == "digits":
        _check_fits(batch_size, chosen_sampling, "--batch-size")
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


def _compare(
    settings: Sequence[Setting], runs: Sequence[Run], results: Results, out: Path, jobs: int, accelerator: str
) -> None:
    console = Console(highlight=False)
    known = sum(run in results.outcomes for run in runs)
    console.print(
        f"{len(runs)} runs, {known} of them already in {results.path}", markup=False, soft_wrap=True
    )
    crashed = train_missing(runs, results, jobs, accelerator, console)
    report(settings, runs, results, out, console)
    for line in crashed:
        typer.echo(f"crashed, to be repeated by the same command: {line}", err=True)
    if crashed:
        raise typer.Exit(1)


def _stored(runs: Sequence[Run], results: Results) -> str:
    known = sum(run in results.outcomes for run in runs)
    return f"{known} of {len(runs)} runs are in {results.path}, and the same command continues from there"


def _results_in(out: Path) -> Results:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Results(out / "results.jsonl")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


def _choice(option: str, value: str, allowed: Sequence[Choice]) -> Choice:
    for choice in allowed:
        if value == choice:
            return choice
    raise typer.BadParameter(f"expected {', '.join(allowed)}; got {value!r}", param_hint=option)


def _choices(option: str, text: str, allowed: Sequence[Choice]) -> list[Choice]:
    return [_choice(option, part, allowed) for part in _parts(text)]


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    numbers = []
    for part in _parts(text):
        try:
            number = kind(part)
        except ValueError:
            number = kind("0")
        if not (number > 0 and math.isfinite(number)):
            what = "whole numbers of at least 1" if kind is int else "numbers above 0"
            raise typer.BadParameter(f"expected {what}, comma-separated; got {part!r}", param_hint=option)
        numbers.append(number)
    return numbers


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _at_least_1(option: str, value: int) -> int:
    if value < 1:
        raise typer.BadParameter(f"expected at least 1, got {value}", param_hint=option)
    return value


def _check_batches_fit(settings: Sequence[Setting]) -> None:
    for setting in settings:
        _check_fits(setting.batch_size, setting.sampling, "--batch-sizes")


def _check_fits(batch_size: int, sampling: Sampling, option: str) -> None:
    most = largest_batch(sampling)
    if batch_size > most:
        raise typer.BadParameter(
            f"{sampling} batches have at most {most} images, got {batch_size}", param_hint=option
        )


def _check_accelerator(accelerator: str) -> None:
    _choice("--accelerator", accelerator, ACCELERATORS)
    if accelerator == "cpu":
        return
    # takes seconds to import
    from lightning_fabric import Fabric

    try:
        Fabric(accelerator=accelerator, devices=1)
    except RuntimeError as error:
        raise typer.BadParameter(str(error), param_hint="--accelerator") from error
