"""Matched BN on data that did not choose its rule, run once for a rule."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import mbnorm
from benchmarks.rows import Row
from evidence.arena import MEASURED, drawn, measured_rows, tables_of, verdict
from evidence.claim import Claim, Tell
from evidence.lists import CONFIRMED, Entrant, Task
from evidence.rule import RIVALS
from evidence.trained import where

OURS = Entrant("matched")
ENTRANTS = (*RIVALS, Entrant("momentum-constant"), Entrant("memorized"), OURS)
LIBRARY = Path(mbnorm.__file__).parent
APPLICATION = ("experiments", "integrations")


def rule() -> str:
    """Return a number for the library's code: another one is another rule, as far as is known.

    Comments and docstrings are not code.
    """
    found = blake2b(digest_size=6)
    for path in sorted(LIBRARY.rglob("*")):
        if path.relative_to(LIBRARY).parts[0] in APPLICATION:
            continue
        if path.suffix == ".py":
            found.update(_without_docstrings(path.read_text(encoding="utf-8")).encode())
        elif path.suffix in (".cpp", ".h"):
            found.update(path.read_bytes())
    return found.hexdigest()


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [line for line in body if not _is_text(line)]
            node.body = kept  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_ours(row: Row) -> bool:
    # the papers' methods stay what they are
    return bool(row["method"] == OURS.method)


def of_rule(rows: Sequence[Row], number: str) -> list[Row]:
    """Return the rows of others, and ours with this rule."""
    return [row for row in rows if not _is_ours(row) or row["rule"] == number]


def _rows(seeds: int, tell: Tell, known: Sequence[Row]) -> Iterator[Row]:
    present = rule()
    for row in measured_rows(CONFIRMED, ENTRANTS, seeds, tell, of_rule(known, present)):
        yield {**row, "rule": present}


def newest(rows: Sequence[Row]) -> tuple[list[Task], list[Row]]:
    """Return the tasks, each with a note if an earlier rule was tried on it, and the rows to show."""
    ours = list(filter(_is_ours, rows))
    number = ours[-1]["rule"] if ours else ""
    tasks = []
    for task in CONFIRMED:
        earlier = {row["rule"] for row in where(ours, task=task.name)} - {number}
        note = "counts as tuned: looked at with an earlier rule" if earlier else task.note
        tasks.append(replace(task, note=note))
    return tasks, of_rule(rows, number)


def _verdict(rows: Sequence[Row]) -> str:
    tasks, shown = newest(rows)
    return verdict(tasks, ENTRANTS, OURS, shown)


CLAIM = Claim(
    title="Data that the rule was not chosen on",
    sentence="What Matched BN reaches on data that did not choose its rule, beside other methods.",
    measured=(
        f"{MEASURED} Rows are only ever added: each has its date, its commit and a number for the library's "
        "code. A task on which an earlier code was tried counts as tuned, and says so."
    ),
    rows=_rows,
    tables=lambda rows: tables_of(newest(rows)[0], ENTRANTS, newest(rows)[1]),
    draw=lambda rows, panels: drawn(newest(rows)[0], ENTRANTS, newest(rows)[1], panels),
    panels=len(CONFIRMED),
    verdict=_verdict,
)
