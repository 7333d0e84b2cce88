"""The tables of a comparison, as Markdown and for the terminal."""

from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from mbnorm.experiments import markdown
from mbnorm.experiments.methods import Method
from mbnorm.experiments.rows import RANKS, Tables, caption, columns, conclusion, mean_ranks, notes, row_of


def as_markdown(tables: Tables, baseline: Method) -> str:
    """Return all tables as Markdown."""
    blocks = [conclusion(tables, baseline), caption(tables, baseline)]
    for setting, rows in tables:
        theirs = row_of(baseline, rows)
        lines = []
        for row in rows:
            cells = row.cells(theirs)
            lines.append([f"*{cell}*" for cell in cells] if row.reference else cells)
        blocks += [f"**{setting}**", markdown.table(columns(baseline, rows), lines), *notes(setting, rows)]
    if len(tables) > 1:
        ranks = [(method, f"{mean:.2f}") for method, mean, _ in mean_ranks(tables)]
        blocks += [
            f"**Mean rank over the {len(tables)} settings**",
            markdown.table(("method", "mean rank"), ranks),
            RANKS,
        ]
    return "\n\n".join(blocks) + "\n"


def show(tables: Tables, baseline: Method, console: Console) -> None:
    """Print all tables to a terminal, and what they come to last."""
    for setting, rows in tables:
        table = _terminal_table(str(setting))
        names = columns(baseline, rows)
        unbroken = names[:4]
        for column in names:
            # 80 columns must do
            header = column.replace("-mode", "").replace(" ", "\n", 1)
            justify: Literal["left", "right"] = "left" if column == "method" else "right"
            table.add_column(header, justify=justify, no_wrap=column in unbroken)
        theirs = row_of(baseline, rows)
        for row in rows:
            cells = [cell.replace(" (", "\n(").replace(", ", "\n") for cell in row.cells(theirs)]
            table.add_row(*cells, style="italic" if row.reference else None)
        console.print(table)
        for note in notes(setting, rows):
            console.print(note, markup=False)
    if len(tables) > 1:
        table = _terminal_table(f"mean rank over the {len(tables)} settings")
        table.add_column("method")
        table.add_column("mean rank", justify="right")
        for method, mean, _ in mean_ranks(tables):
            table.add_row(method, f"{mean:.2f}")
        console.print(table)
        console.print(RANKS, markup=False)
    console.print(conclusion(tables, baseline), markup=False, style="bold")


def _terminal_table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
    )
