"""Measures a claim: its data, its table and its plot."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import torch

from benchmarks.rows import Row, machine
from evidence import (
    averages,
    batch_size,
    batches_of_128,
    best_noise,
    confirmed,
    cost,
    double_forward,
    fine_tuned_statistics,
    fine_tuning,
    gap,
    gradient_forms,
    loss_scale,
    noise,
    noise_of_mobilenet,
    noise_ranking,
    oracle,
    orthogonality,
    rates,
    real_data,
    recommendation,
    regularizer,
    rule,
    sampling,
    staleness,
    suite,
    underfitting,
    whole_cifar10,
)
from evidence.claim import PLOT, Claim, as_markdown, draw
from mbnorm.experiments.records import append, check_versions, read

CLAIMS: dict[str, Claim] = {
    "batch-size": batch_size.CLAIM,
    "sampling": sampling.CLAIM,
    "staleness": staleness.CLAIM,
    "noise": noise.CLAIM,
    "gap": gap.CLAIM,
    "rates": rates.CLAIM,
    "cost": cost.CLAIM,
    "double-forward": double_forward.CLAIM,
    "batches-of-128": batches_of_128.CLAIM,
    "suite": suite.CLAIM,
    "averages": averages.CLAIM,
    "recommendation": recommendation.CLAIM,
    "real-data": real_data.CLAIM,
    "rule": rule.CLAIM,
    "whole-cifar10": whole_cifar10.CLAIM,
    "confirmed": confirmed.CLAIM,
    "oracle": oracle.CLAIM,
    "orthogonality": orthogonality.CLAIM,
    "gradient-forms": gradient_forms.CLAIM,
    "loss-scale": loss_scale.CLAIM,
    "fine-tuned-statistics": fine_tuned_statistics.CLAIM,
    "regularizer": regularizer.CLAIM,
    "underfitting": underfitting.CLAIM,
    "best-noise": best_noise.CLAIM,
    "noise-ranking": noise_ranking.CLAIM,
    "noise-of-mobilenet": noise_of_mobilenet.CLAIM,
    "fine-tuning": fine_tuning.CLAIM,
    "fine-tuning-confirmed": fine_tuning.CONFIRMED,
}
WIDTH = 79
NAMES = 2 + max(map(len, CLAIMS))
"""The width of the column with the claims' names."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments``, or those of the process, describe; return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.name is None:
        parser.print_help()
        return 0
    claim, folder = CLAIMS[options.name], options.out or Path("runs/evidence") / options.name
    seeds = options.seeds or claim.seeds
    data = folder / "data.jsonl"
    if options.redraw and not data.exists():
        parser.error(f"--redraw: there are no data in {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        known = read(data, dict)
        if not options.redraw:
            check_versions(data, known)
    except (OSError, ValueError) as error:
        parser.error(f"--out: {error}")
    try:
        if not options.redraw:
            claim.check()
    except ValueError as error:
        parser.error(str(error))
    try:
        rows = known if options.redraw else _measured(claim, seeds, known, data)
    except KeyboardInterrupt:
        print(f"interrupted: what is measured is in {data}, and the same command goes on", file=sys.stderr)
        return 130
    command = f"python -m evidence {options.name}"
    command += f" --seeds {seeds}" if seeds != claim.seeds else ""
    table = as_markdown(claim, rows, command)
    (folder / "table.md").write_text(table, encoding="utf-8")
    draw(claim, rows, folder / PLOT)
    print(f"{table}\n{len(rows) - len(known)} measured, {len(known)} were there{_origin(known)}: {data}")
    print(f"written: {folder / 'table.md'}, {folder / 'plot.png'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Measure a claim. Each row is stored in data.jsonl as soon as it is measured; table.md and plot.png "
        "are made from the rows. This takes minutes to hours on one core. Stopped, the same command goes on. "
        "docs/results/README.md says what was found."
    )
    parser = argparse.ArgumentParser(
        prog="python -m evidence",
        description=fill(about, WIDTH),
        epilog="\n".join(["claims:", *(_entry(name, claim.sentence) for name, claim in CLAIMS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", nargs="?", choices=list(CLAIMS), metavar="NAME", help="one of the claims below"
    )
    parser.add_argument(
        "--seeds", type=_count, metavar="N", help="measure from seeds 0 to N-1 (5; 3 of fine-tunings)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the rows are (runs/evidence/NAME)")
    parser.add_argument("--redraw", action="store_true", help="only make table and plot of the rows")
    return parser


def _entry(name: str, sentence: str) -> str:
    return fill(sentence, WIDTH, initial_indent=f"  {name:{NAMES}}", subsequent_indent=(2 + NAMES) * " ")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text!r}")
    return int(text)


def _origin(rows: Sequence[Row]) -> str:
    """Return which commits have measured the rows, if there are any."""
    commits = dict.fromkeys(row.get("commit") or "unknown" for row in rows)
    if not commits:
        return ""
    return f", of {'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}"


def _measured(claim: Claim, seeds: int, known: Sequence[Row], path: Path) -> list[Row]:
    """Return the known rows and the others, each of which is stored as soon as it is measured."""
    # nets this small gain nothing from more threads, nor from what prepares for large ones
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    rows = list(known)
    for row in claim.rows(seeds, lambda line: print(line, file=sys.stderr, flush=True), known):
        rows.append(row | machine())
        append(path, rows[-1])
    return rows
