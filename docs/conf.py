"""The site: pages in Markdown, the reference from the docstrings. It loads nothing from the network."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import matplotlib
from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

from hessfn.reporting.options import Options

project = "hessfn"
author = copyright = "the hessfn developers"
version = release = importlib.metadata.version("hessfn")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # their outputs are in them
nb_ipywidgets_js = {}
exclude_patterns = ["_build"]

# A role or link that leads nowhere fails the build. Types are exempt: they name what no reference here describes.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Tree": "Tree", "MatVec": "MatVec"}
python_maximum_signature_line_length = 110
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what stands before a colon is no type

html_theme = "furo"
html_title = f"hessfn {version}"
html_math_renderer = "mathml"
html_static_path = ["style.css", str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSerif.ttf"))]
html_css_files = ["style.css"]
html_copy_source = html_show_sphinx = False
pygments_style, pygments_dark_style = "tango", "monokai"


def _math(self: Any, node: Any) -> None:
    """Browsers draw MathML by themselves: no script, no font, no network."""
    block = node.tagname == "math_block"
    try:
        markup = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        markup = ""
    self.body.append(f'<div class="math">{markup}</div>' if block else markup)
    raise SkipNode


def _aliases(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Names of types inside of others are shown as names too, and any arguments as ``Callable[..., T]``."""
    named = [text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns)]
    named = [text and text.replace("Callable[[...],", "Callable[...,") for text in named]
    return tuple(text and re.sub(r"\bOptions\.(\w+)", lambda m: repr(getattr(Options, m[1])), text) for text in named)


def _fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What is said of a field names no type. Napoleon takes all up to a colon for one, in the first line: a comment."""
    if what == "attribute":
        lines[:0] = [".. field", ""]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _fields, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _aliases)
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
