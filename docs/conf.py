"""How sphinx builds these pages: `make docs`."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from mbnorm import __version__

project = "mbnorm"
author = "The mbnorm authors"
copyright = "The mbnorm authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_math_renderer = "mathml"
exclude_patterns = ["build"]
# docstrings name objects in single backticks; torch's stay plain text, since links to them need a network
default_role = "py:obj"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"mbnorm {__version__}"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["pages.css"]


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    # the converter does not know the environment within a formula, which looks the same
    text = node.astext().replace("{aligned}", "{align*}")
    translator.body.append(f'<div class="math">{convert(text, display="block")}</div>')
    raise nodes.SkipNode


def _tables_below(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the tables of results below their overview; in its file GitHub would show the directive."""
    if page == "results/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*/table\n```\n"


def setup(app: Sphinx) -> None:
    """Turn formulas into MathML, which browsers show without a script and without a network."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("source-read", _tables_below)
