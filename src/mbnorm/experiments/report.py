"""What the runs of a setting came to: rows sorted by accuracy, as Markdown and for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich import box
from rich.console import Console
from rich.table import Table

from mbnorm.experiments.grid import Run, Setting, reference_of
from mbnorm.experiments.methods import OURS, Method
from mbnorm.experiments.training import FIRST_FORWARD, Outcome

CAPTION = (
    "Test accuracy on 797 of scikit-learn's digits after training on the other 1000: mean ± standard "
    "deviation over the seeds. From one seed all methods start at the same weights and see the same batches. "
    "The losses are those of the trained net on its training images, with its layers in train mode and in "
    "eval mode. Written by `mbnorm compare`."
)
COLUMNS = ("method", "accuracy, %", "seeds", "failed", "train-mode loss", "eval-mode loss")


@dataclass(frozen=True)
class Row:
    """The runs of one method in one setting."""

    method: Method
    outcomes: tuple[Outcome, ...]
    reference: Setting | None = None

    @property
    def label(self) -> str:
        """The method's name, and where the reference stands if this is one."""
        return (
            self.method if self.reference is None else f"batch, m = {self.reference.batch_size} (reference)"
        )

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each run that has one."""
        return [o.accuracy for o in self.outcomes if o.accuracy is not None]

    @property
    def mean_accuracy(self) -> float | None:
        """The mean over the runs that have an accuracy."""
        return fmean(self.accuracies) if self.accuracies else None

    @property
    def error(self) -> str | None:
        """Why runs failed, if some did."""
        return next((o.error for o in self.outcomes if o.error is not None), None)

    def cells(self) -> tuple[str, ...]:
        """Return the row's text, one for each of `COLUMNS`."""
        return (
            self.label,
            _mean_and_spread(self.accuracies),
            str(len(self.outcomes)),
            self._failures(),
            _mean_loss([o.train_mode_loss for o in self.outcomes if o.status != "failed"]),
            _mean_loss([o.eval_mode_loss for o in self.outcomes if o.status != "failed"]),
        )

    def _failures(self) -> str:
        statuses = [o.status for o in self.outcomes]
        counts = [(statuses.count("failed"), "failed"), (statuses.count("diverged"), "diverged")]
        return ", ".join(f"{n} {what}" for n, what in counts if n) or "0"


def rows_of(setting: Setting, outcomes: Mapping[Run, Outcome]) -> list[Row]:
    """Return a row for each method and for the reference, best accuracy first and failures last."""
    by_method: dict[Method, list[Outcome]] = {}
    for run, outcome in outcomes.items():
        if run.setting == setting:
            by_method.setdefault(run.method, []).append(outcome)
    rows = [Row(method, tuple(found)) for method, found in by_method.items()]
    reference = reference_of(setting)
    found = [o for run, o in outcomes.items() if run.setting == reference and run.method == "batch"]
    if found and reference != setting:
        rows.append(Row("batch", tuple(found), reference))
    return sorted(
        rows, key=lambda row: -1.0 if row.mean_accuracy is None else row.mean_accuracy, reverse=True
    )


def as_markdown(tables: Sequence[tuple[Setting, Sequence[Row]]]) -> str:
    """Return all tables as Markdown."""
    blocks = [CAPTION]
    for setting, rows in tables:
        header = [_markdown_row(COLUMNS), _markdown_row(["---"] + ["---:"] * (len(COLUMNS) - 1))]
        lines = [
            _markdown_row([f"*{cell}*" for cell in row.cells()] if row.reference else row.cells())
            for row in rows
        ]
        blocks += [f"**{setting}**", "\n".join(header + lines), *notes(setting, rows)]
    return "\n\n".join(blocks) + "\n"


def show(tables: Sequence[tuple[Setting, Sequence[Row]]], console: Console) -> None:
    """Print all tables to a terminal."""
    for setting, rows in tables:
        table = Table(
            title=str(setting),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for column in COLUMNS:
            # 80 columns must do
            header = column.replace("mode loss", "mode\nloss")
            table.add_column(header, justify="left" if column == "method" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row.cells(), style="italic" if row.reference else None)
        console.print(table)
        for note in notes(setting, rows):
            console.print(note, markup=False)


def notes(setting: Setting, rows: Sequence[Row]) -> list[str]:
    """Return the sentences under a table: where mbnorm's layers lose, how they started, why runs failed."""
    ranked = [row for row in rows if row.reference is None and row.mean_accuracy is not None]
    ours = [row for row in ranked if row.method in OURS]
    said = []
    if ours and ours[0] is not ranked[0]:
        said.append(f"{ranked[0].label} does best here, before all of mbnorm's layers.")
    if ours and setting.batch_size == 1:
        said.append(f"mbnorm's layers were given a memory by one forward of {FIRST_FORWARD} images.")
    return said + [f"{row.label} failed: {row.error}." for row in rows if row.error is not None]


def _mean_and_spread(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "-"
    mean = f"{fmean(accuracies):.1f}"
    return mean if len(accuracies) == 1 else f"{mean} ± {stdev(accuracies):.1f}"


def _mean_loss(losses: Sequence[float | None]) -> str:
    finite = [loss for loss in losses if loss is not None]
    if not losses:
        return "-"
    return f"{fmean(finite):.3f}" if len(finite) == len(losses) else "not finite"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
