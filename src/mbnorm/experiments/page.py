"""A self-contained HTML page of text, tables and SVG figures: for the screen, a phone and paper."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


@dataclass(frozen=True)
class Figure:
    """An ``<svg>`` element, and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the rows with the numbers in ``marked`` stand in italics."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Section:
    """A part of a page: text, figures, tables, and notes under them."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A title, what there is to say first, and the sections.

    Attributes:
        title: the page's.
        lead: what there is to say; the first is what was found, and stands out.
        legend: the colors of the figures, and what they mean.
        command: what writes the page.
        sections: the rest.
        footer: where it all comes from.
    """

    title: str
    lead: Sequence[str] = ()
    legend: Sequence[tuple[str, str]] = ()
    command: str = ""
    sections: Sequence[Section] = ()
    footer: str = ""


def render(page: Page) -> str:
    """Return the page as HTML that needs no network and no script; all text is escaped.

    The figures alone are taken as they are: they come from `mbnorm.experiments.plot.as_svg`.

    >>> "<h1>5 &lt; 6</h1>" in render(Page("5 < 6"))
    True
    """
    numbers = count(1)

    def svg(figure: Figure) -> Markup:
        return _for_a_page(figure, next(numbers))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render(page=page, svg=svg)


def _for_a_page(figure: Figure, number: int) -> Markup:
    # each figure has a glyph, an axis and a clipping path of the same name
    own = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>f{number}-", figure.svg)
    label = f'<svg role="img" aria-label="{escape(figure.caption)}" '
    return Markup(own.replace("<svg ", label, 1))
