"""`mbnorm claim`: measures a claim again, and writes its data, its table and its plot."""

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from mbnorm.experiments.bench.rows import Row, machine
from mbnorm.experiments.claims import (
    averages,
    batch_size,
    cost,
    double_forward,
    gap,
    noise,
    rates,
    recommendation,
    sampling,
    staleness,
    suite,
)
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
    "double-forward": double_forward.CLAIM,
    "suite": suite.CLAIM,
    "averages": averages.CLAIM,
    "recommendation": recommendation.CLAIM,
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
    if redraw and not (folder / "data.jsonl").exists():
        raise typer.BadParameter(f"there are no data in {folder}", param_hint="--redraw")
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
    rows = _read(path) if claim.resumes and path.exists() else []
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(_line, rows))
        for row in claim.rows(seeds, lambda line: print(line, file=sys.stderr, flush=True), tuple(rows)):
            rows.append(row | machine())
            file.write(_line(rows[-1]))
            file.flush()
    return rows


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _read(path: Path) -> list[Row]:
    # what follows the last line end was being written when its process died
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]
