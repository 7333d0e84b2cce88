"""`mbnorm claim`: measures a claim again, and writes its data, its table and its plot."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from mbnorm.experiments.bench.rows import Row, machine
from mbnorm.experiments.claims import batch_size, cost, gap, noise, rates, sampling, staleness
from mbnorm.experiments.claims.claim import Claim, as_markdown, draw
from mbnorm.experiments.commands.options import choice

CLAIMS: dict[str, Claim] = {
    "batch-size": batch_size.CLAIM,
    "sampling": sampling.CLAIM,
    "staleness": staleness.CLAIM,
    "noise": noise.CLAIM,
    "gap": gap.CLAIM,
    "rates": rates.CLAIM,
    "cost": cost.CLAIM,
}


def claim(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(CLAIMS)}.", metavar="NAME")],
    seeds: Annotated[int, typer.Option(help="Measure from seeds 0 to N-1.", metavar="N", min=1)] = 5,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for data.jsonl, table.md and plot.png.",
            metavar="FOLDER",
            show_default="docs/results/NAME",
        ),
    ] = None,
    redraw: Annotated[
        bool, typer.Option("--redraw", help="Make table and plot of the data that are there.")
    ] = False,
) -> None:
    """Measure one of the papers' claims again on digits: its data, its table and its plot.

    It runs some minutes on one core; docs/results/README.md says what was found.
    """
    choice("NAME", name, list(CLAIMS))
    folder = Path("docs/results") / name if out is None else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = (
            _read(folder / "data.jsonl") if redraw else _measure(CLAIMS[name], seeds, folder / "data.jsonl")
        )
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    command = f"mbnorm claim {name}" + (f" --seeds {seeds}" if seeds != 5 else "")
    table = as_markdown(CLAIMS[name], rows, command)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw(CLAIMS[name], rows, folder / "plot.png")
    typer.echo(f"{table}\nwritten: {folder / 'data.jsonl'}, {folder / 'table.md'}, {folder / 'plot.png'}")


def _measure(claim: Claim, seeds: int, path: Path) -> list[Row]:
    # nets this small gain nothing from more threads, nor from what prepares for large ones
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    rows = []
    with path.open("w", encoding="utf-8") as file:
        for row in claim.rows(seeds, lambda line: print(line, file=sys.stderr, flush=True)):
            rows.append(row | machine())
            file.write(json.dumps(rows[-1], allow_nan=False) + "\n")
            file.flush()
    return rows


def _read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
