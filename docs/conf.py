"""How sphinx builds these pages: `make docs`."""

from mbnorm import __version__

project = "mbnorm"
author = "The mbnorm authors"
copyright = "The mbnorm authors, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["build"]
# tables of results have none: they are reached from a page that has
suppress_warnings = ["toc.no_title"]
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
