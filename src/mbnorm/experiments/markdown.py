"""Tables in Markdown."""

from collections.abc import Sequence

RULES = {"l": "---", "r": "--:"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """Return a table in GitHub's Markdown, padded so that it reads as text.

    Args:
        header: the headings.
        rows: as many cells each.
        align: "l" or "r" for each column; by default the first is "l" and the others are "r".

    Raises:
        ValueError: ``align`` or a row has another number of columns than the header, or an unknown letter.

    >>> print(table(["method", "%"], [["batch", "63.9"], ["group", "94.3"]]))
    | method |    % |
    | ------ | ---: |
    | batch  | 63.9 |
    | group  | 94.3 |
    """
    align = "l" + "r" * (len(header) - 1) if align is None else align
    lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
    for columns in (align, *lines):
        if len(columns) != len(header):
            raise ValueError(f"expected {len(header)} columns, got {len(columns)}: {columns!r}")
    if not set(align) <= RULES.keys():
        raise ValueError(f'align must be of "l" and "r", got {align!r}')
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]
    rule = [RULES[side].rjust(width, "-") for side, width in zip(align, widths, strict=True)]
    places = [f"{{:{'<' if side == 'l' else '>'}{width}}}" for side, width in zip(align, widths, strict=True)]
    head, *body = [[place.format(cell) for place, cell in zip(places, line, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))
