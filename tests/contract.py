"""Writes docs/contract.md: what is promised, and the tests whose markers say that they prove it."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "contract.md"
NOT_APPLICABLE = "not applicable: "
HEAD = """\
# What mbnorm promises

Each line promises how the layers behave in a situation of training scripts, and names its tests.
`make contract` writes this page from `tests/promises.txt` and the `contract` markers of the tests.

| ID | promise | proven by |
| --- | --- | --- |
"""


def promises(text: str) -> dict[str, str]:
    """Return what is promised under each ID, sorted by kind, as the kinds first appear, and number."""
    lines = dict(line.split(": ", 1) for line in text.splitlines())
    kinds = list(dict.fromkeys(map(_kind, lines)))
    return dict(sorted(lines.items(), key=lambda line: (kinds.index(_kind(line[0])), _number(line[0]))))


def proofs(directory: Path) -> dict[str, list[str]]:
    """Return the tests under ``directory`` that carry each ID."""
    found: dict[str, list[str]] = {}
    for path in sorted(directory.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.contract":
                    for argument in decorator.args:
                        found.setdefault(ast.literal_eval(argument), []).append(f"{path.stem}::{node.name}")
    return found


def page(promised: dict[str, str], proven: dict[str, list[str]]) -> str:
    """Return the text of the page."""
    rows = (
        f"| {name} | {promise} | {'<br>'.join(f'`{test}`' for test in proven.get(name, []))} |\n"
        for name, promise in promised.items()
    )
    return HEAD + "".join(rows)


def _kind(name: str) -> str:
    return name.rstrip("0123456789")


def _number(name: str) -> int:
    return int(name.removeprefix(_kind(name)))


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    text = page(promises((TESTS / "promises.txt").read_text(encoding="utf-8")), proofs(TESTS))
    PAGE.write_text(text, encoding="utf-8")
