"""The numbers of README and pages: each stands in a table that its section links to."""

import re
from collections import defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from evidence.trained import score_of
from mbnorm.experiments.estimates import paired_difference
from mbnorm.experiments.records import read

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = DOCS / "results" / "README.md"
COMPARE = DOCS / "compare.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), RESULTS]
INTERVAL = re.compile(r"(\d[\d.]*) ± (\d[\d.]*\d)")
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")
SHARE = re.compile(r"(\d+(?:\.\d+)?) (?:%|points?\b)")
TABLE = re.compile(r"(?:results/)?([\w-]+)/table\.md|(compare)\.md|benchmarks/results/([\w-]+\.md)")
LEVEL = "95"
"""Percent, of every interval: no result."""
NOT_MEASURED = {"method.md", "migrate.md", "changelog.md", "contract.md", "api.md"}
"""Pages whose shares are of formulas, or of code that they run."""


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def plain(text):
    """Return a page without code and formulas; what is linked stays."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)
    return re.sub(r"`[^`\n]*`", lambda code: code[0] if TABLE.search(code[0]) else "", text)


def units(page):
    """Yield the sections of a page, and each line of a table that links to one of its own by itself."""
    section = []
    for line in [*plain(page.read_text(encoding="utf-8")).splitlines(), "# the end"]:
        if line.startswith("|") and TABLE.search(line):
            yield line
        elif line.startswith("#"):
            yield "\n".join(section)
            section = []
        else:
            section.append(line)


def tables_in(text):
    """Return the tables that a text names: folders of claims, the page of compare, files of benchmarks."""
    return {next(filter(None, match.groups())) for match in TABLE.finditer(text)}


@cache
def shown(table):
    """Return the text of a table, and as its rows give them all differences of two methods or settings."""
    if table.endswith(".md"):
        return (ROOT / "benchmarks" / "results" / table).read_text(encoding="utf-8")
    if table == "compare":
        return COMPARE.read_text(encoding="utf-8")
    folder = DOCS / "results" / table
    differences = map(str, differences_of(read(folder / "data.jsonl", dict)))
    return "\n".join([(folder / "table.md").read_text(encoding="utf-8"), *differences])


def differences_of(rows):
    """Yield the differences, seed by seed, of two methods in a setting and of two settings of a method."""
    groups = defaultdict(dict)
    for row in rows:
        method, setting = row.get("entrant", row.get("method")), setting_of(row)
        if method is not None and row.get("part") != "choice" and row.get("accuracy") is not None:
            groups[method, setting, 1][row["seed"]] = score_of(row)
            for loss in ("train_mode_loss", "eval_mode_loss"):
                if row.get(loss) is not None:
                    groups[method, (*setting, loss), 3][row["seed"]] = row[loss]
    for (one, ours), (other, theirs) in combinations(groups.items(), 2):
        if one[2] == other[2] and (one[0] == other[0] or one[1] == other[1]):
            difference = paired_difference(ours, theirs)
            if difference and difference.half_width is not None:
                yield difference.text(one[2])


def setting_of(row):
    """Return what a row has in common with those it is compared with."""
    names = ("task",) if "part" in row else ("task", "rate", "steps")
    if "task" not in row:
        names = ("model", "batch_size", "sampling", "lr", "epochs", "data")
    return tuple(row.get(name) for name in names)


def not_in(tables, found):
    """Return those of the numbers found that are not in the tables, whose last digits may be rounded away."""
    texts = [shown(table).replace(",", "") for table in tables]
    known = {float(number) for text in texts for number in re.findall(r"\d+(?:\.\d+)?", text)}
    return [
        number
        for number in found
        if not any(f"{value:.{len(number.partition('.')[2])}f}" == number for value in known)
    ]


@pytest.mark.parametrize("page", [page for page in PAGES if page != COMPARE], ids=name_of)
def test_every_interval_stands_in_a_table_that_is_linked_there(page):
    missing = []
    for unit in units(page):
        known = {pair for table in tables_in(unit) for pair in INTERVAL.findall(shown(table))}
        missing += [" ± ".join(pair) for pair in INTERVAL.findall(unit) if pair not in known]
    assert missing == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (COMPARE, RESULTS)], ids=name_of)
def test_decimals_beside_a_link_to_a_table_stand_in_it(page):
    missing = []
    for unit in units(page):
        for paragraph in re.split(r"\n\s*\n", unit):
            if tables := tables_in(paragraph):
                missing += not_in(tables, DECIMAL.findall(paragraph))
    assert missing == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in (COMPARE, RESULTS) and page.name not in NOT_MEASURED],
    ids=name_of,
)
def test_percents_and_points_stand_in_a_table_that_is_linked_there(page):
    missing = []
    for unit in units(page):
        shares = [number for number in SHARE.findall(unit) if number != LEVEL]
        missing += not_in(tables_in(unit), shares)
    assert missing == []


def test_a_number_that_stands_nowhere_is_found(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("# a\n[here](results/confirmed/table.md) 84.1 ± 0.4 and 84.1 ± 0.5\n# b\n84.1 ± 0.4\n")
    monkeypatch.setattr("test_numbers.PAGES", [page])
    with pytest.raises(AssertionError, match=r"84.1 ± 0.5', '84.1 ± 0.4"):
        test_every_interval_stands_in_a_table_that_is_linked_there(page)
    page.write_text("# a\n[here](results/confirmed/table.md): 84.1, 84.37 and 84 %\n# b\n83 points\n")
    with pytest.raises(AssertionError, match=r"'84.37'"):
        test_decimals_beside_a_link_to_a_table_stand_in_it(page)
    with pytest.raises(AssertionError, match=r"'83'"):
        test_percents_and_points_stand_in_a_table_that_is_linked_there(page)


def test_differences_follow_from_the_rows():
    scores = {"ours": (2.0, 4.0, 6.0), "theirs": (1.0, 2.0, 3.0)}
    rows = [
        {"task": "t", "part": "report", "method": name, "seed": seed, "status": "ok", "accuracy": score}
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]
    assert list(differences_of(rows)) == ["2.0 ± 2.5"]
