"""`mbnorm compare`."""

import shlex
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mbnorm.experiments.commands.options import (
    ACCELERATORS,
    DATA_NAMES,
    at_least_1,
    check_accelerator,
    check_batch_fits,
    choice,
    choices,
    data_sets,
    models,
    numbers,
)
from mbnorm.experiments.compare import report, train_missing
from mbnorm.experiments.data import load
from mbnorm.experiments.grid import (
    SEEDS,
    SUITE_METHODS,
    SUITES,
    Run,
    Setting,
    grid_settings,
    runs_of,
    suite_runs,
    suite_settings,
)
from mbnorm.experiments.losses import LOSSES
from mbnorm.experiments.methods import METHODS
from mbnorm.experiments.models import MODELS, why_not
from mbnorm.experiments.progress import prepare_kernels
from mbnorm.experiments.results import Results
from mbnorm.experiments.sampling import SAMPLINGS
from mbnorm.experiments.workers import PACKAGES, SCHEDULERS, Scheduler


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
        str | None,
        typer.Option(
            help=f"Methods, comma-separated: {', '.join(METHODS)}.",
            metavar="LIST",
            show_default=f"{', '.join(SUITE_METHODS['quick'])}; with --suite full all",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Train from seeds 0 to N-1.", metavar="N", show_default="3, with --suite full 5"),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(help="Grid: batch sizes m, comma-separated.", metavar="LIST", show_default="2"),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(
            help="Grid: how batches are drawn, comma-separated: shuffled; one-class (all images of a batch "
            "are of one class); drifting (class after class); long-tailed (50 images of the first class "
            "for each of the last).",
            metavar="LIST",
            show_default="shuffled",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Grid: nets, comma-separated: {', '.join(MODELS)}, timm:NAME.",
            metavar="LIST",
            show_default="mlp",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Grid: data sets, comma-separated: {DATA_NAMES}.",
            metavar="LIST",
            show_default="digits",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option(help="The method that the others are compared with, seed by seed.", metavar="NAME")
    ] = "batch",
    epochs: Annotated[
        int | None,
        typer.Option(help="Grid: epochs of training.", metavar="N", show_default="mlp 10, others 8"),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Grid: learning rates, comma-separated.", metavar="LIST", show_default="0.1 m/64 at each m"
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Grid: the loss; dice adds the overlaps of classes to cross-entropy, for small classes.",
            metavar="|".join(LOSSES),
            show_default="cross-entropy",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for results.jsonl, table.md, compare.png and report.html.", metavar="FOLDER"
        ),
    ] = Path("runs/compare"),
    jobs: Annotated[
        int | None,
        typer.Option(help="Runs at a time, a process each.", metavar="N", show_default="number of cores"),
    ] = None,
    scheduler: Annotated[
        str,
        typer.Option(
            help="Where the runs go: local, the processes of this machine; dask:ADDRESS or ray:ADDRESS, a "
            "cluster. Without an address Dask starts one here, and Ray takes the one that RAY_ADDRESS names.",
            metavar="NAME",
        ),
    ] = "local",
    accelerator: Annotated[
        str,
        typer.Option(
            help="Where to train; nets this small gain nothing from a GPU.", metavar="|".join(ACCELERATORS)
        ),
    ] = "cpu",
) -> None:
    """Train small nets with each normalization method, and compare their test scores.

    The settings are those of --suite. If any option marked Grid is given, they are all combinations of the
    Grid options instead; options that are not given have their defaults.

    A result is stored as soon as its run ends. Ctrl-C stops the command. The same command, or another that
    shares runs with it, then trains only the runs that are not in the folder yet.
    """
    chosen_suite = choice("--suite", suite, SUITES)
    methods = ",".join(SUITE_METHODS[chosen_suite]) if methods is None else methods
    chosen_methods = choices("--methods", methods, METHODS)
    seeds = at_least_1("--seeds", SEEDS[chosen_suite] if seeds is None else seeds)
    chosen_baseline = choice("--baseline", baseline, METHODS)
    jobs = None if jobs is None else at_least_1("--jobs", jobs)
    check_accelerator(accelerator)
    cluster = _scheduler(scheduler)
    grid = {
        "--model": model,
        "--data": data,
        "--batch-sizes": batch_sizes,
        "--sampling": sampling,
        "--lr": lr,
        "--epochs": epochs,
        "--loss": loss,
    }
    chosen = {option: str(value) for option, value in grid.items() if value is not None}
    if not chosen:
        chosen = {"--suite": suite}
        settings = suite_settings(chosen_suite)
        runs = suite_runs(chosen_suite, chosen_methods, seeds)
    else:
        settings = grid_settings(
            models("--model", "mlp" if model is None else model),
            numbers("--batch-sizes", "2" if batch_sizes is None else batch_sizes, int),
            choices("--sampling", "shuffled" if sampling is None else sampling, SAMPLINGS),
            None if lr is None else numbers("--lr", lr, float),
            None if epochs is None else at_least_1("--epochs", epochs),
            data_sets("--data", "digits" if data is None else data),
            "cross-entropy" if loss is None else choice("--loss", loss, list(LOSSES)),
        )
        _check_fit(settings)
        runs = runs_of(settings, chosen_methods, seeds)
    chosen |= {"--methods": methods, "--seeds": str(seeds), "--baseline": baseline, "--out": str(out)}
    command = shlex.join(["mbnorm", "compare", *(word for option in chosen.items() for word in option)])
    results = _results_in(out)
    console = Console(highlight=False)
    known = sum(run in results.outcomes for run in runs)
    console.print(
        f"{len(runs)} runs, {known} of them already in {results.path}", markup=False, soft_wrap=True
    )
    if known < len(runs) and (accelerator, cluster[0]) == ("cpu", "local"):
        prepare_kernels(chosen_methods)
    try:
        crashed = train_missing(runs, results, console, jobs, accelerator, *cluster)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: {_stored(runs, results)}", err=True)
        raise typer.Exit(130) from None
    except BrokenProcessPool:
        typer.echo(f"a process died, for want of memory perhaps: {_stored(runs, results)}", err=True)
        raise typer.Exit(1) from None
    except ConnectionError as error:
        typer.echo(f"mbnorm: {error}", err=True)
        raise typer.Exit(1) from None
    report(settings, runs, results, out, console, baseline=chosen_baseline, command=command)
    for line in crashed:
        typer.echo(f"crashed, to be repeated by the same command: {line}", err=True)
    if crashed:
        raise typer.Exit(1)


def _scheduler(text: str) -> tuple[Scheduler, str | None]:
    name, _, address = text.partition(":")
    chosen = choice("--scheduler", name, SCHEDULERS)
    package = PACKAGES.get(chosen)
    if package is not None and find_spec(package) is None:
        raise typer.BadParameter(f"{name} needs {package}: pip install {package}", param_hint="--scheduler")
    if address and chosen == "local":
        raise typer.BadParameter(f"local takes no address, got {address!r}", param_hint="--scheduler")
    return chosen, address or None


def _stored(runs: Sequence[Run], results: Results) -> str:
    known = sum(run in results.outcomes for run in runs)
    return f"{known} of {len(runs)} runs are in {results.path}, and the same command continues from there"


def _results_in(out: Path) -> Results:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Results(out / "results.jsonl")
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error


def _check_fit(settings: Sequence[Setting]) -> None:
    for setting in settings:
        why = why_not(setting.model, load(setting.data))
        if why is not None:
            raise typer.BadParameter(f"{why}: {setting.data}", param_hint="--model")
        check_batch_fits(setting.batch_size, setting.sampling, setting.data, "--batch-sizes")
