"""The site: pages in Markdown, the reference from the docstrings. It loads nothing from the network."""

import base64
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

from docutils.nodes import SkipNode, Text, math
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import hessfn
from hessfn.reporting.options import Options

sys.path.append(str(Path(__file__).parent))

project = "hessfn"
author = copyright = "the hessfn developers"
version = release = importlib.metadata.version("hessfn")

extensions = [
    "myst_nb",
    "notebook_pictures",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # their outputs are in them
nb_ipywidgets_js = {}
exclude_patterns = ["_build", "fonts"]
templates_path = ["_templates"]

# A role or link that leads nowhere fails the build. Types are exempt: they name what no reference here describes.
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Tree": "Tree", "MatVec": "MatVec"}
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what stands before a colon is no type

html_theme = "furo"
html_title = f"hessfn {version}"
html_math_renderer = "mathml"
html_static_path = ["style.css"]
html_css_files = ["style.css", "math.css"]
html_copy_source = html_show_sphinx = html_use_index = html_domain_indices = False
pygments_style, pygments_dark_style = "tango", "monokai"


def _spaced(markup: str) -> str:
    """Bars and names of functions as TeX sets them.

    A bar by itself is as high as a letter; \\left makes it grow. A name has a thin space before it, unless an operator
    is there, and one after it, unless a bracket or a space is there.
    """
    markup = re.sub(r"<mo(?: class=\"math(?:open|close)\")?>‖</mo>", '<mo stretchy="false">‖</mo>', markup)

    def name(found: re.Match[str]) -> str:
        before, word, bracket = found.groups(default="")
        space = [f'{side}space="{0.167 if wanted else 0}em"' for side, wanted in (("l", before), ("r", not bracket))]
        return f"{before}<mo {' '.join(space)}>{word}</mo>{bracket}"

    bracket = r'\s*<(?:mo stretchy="false">\(|mspace)'
    return re.sub(rf"(</m(?!o)\w+>\s*)?<mi[^>]*>(\w+)</mi>\s*<mo>&ApplyFunction;</mo>({bracket})?", name, markup)


def _math(self: Any, node: Any) -> None:
    """Browsers draw MathML by themselves: no script, no network."""
    block = node.tagname == "math_block"
    try:
        markup = _spaced(tex2mathml(node.astext(), as_block=block))
    except (MathError, IndexError) as error:  # the second is of an index or exponent of nothing
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        markup = ""
    line = f'<span class="whole">{markup}{node.get("sign", "")}</span>'
    self.body.append(f'<div class="math">{markup}</div>' if block else line)
    raise SkipNode


def _signs(app: Any, doctree: Any, docname: str) -> None:
    """A full stop or comma stays on the line of the formula before it: browsers would break there."""
    for node in doctree.findall(math):
        after = node.next_node(descend=False, siblings=True)
        found = re.match(r"[.,;:)]+", after) if isinstance(after, Text) else None
        if found:
            node["sign"] = found[0]
            after.parent.replace(after, Text(after[found.end() :]))


def _font(app: Any) -> None:
    """The font goes into the style sheet: some browsers refuse a page from a disk a font in a file."""
    font = base64.b64encode(Path(app.srcdir, "fonts", "STIXTwoMath.woff").read_bytes()).decode()
    sheet = Path(app.doctreedir, "math.css")
    sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet.write_text(f'@font-face {{ font-family: "Formulas"; src: url("data:font/woff;base64,{font}"); }}\n')
    app.config.html_static_path.append(str(sheet))


def _aliases(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Names of types inside of others are shown as names too, and any arguments as ``Callable[..., T]``."""
    named = [text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns)]
    named = [text and text.replace("Callable[[...],", "Callable[...,") for text in named]
    constants = {f"Options.{field}": getattr(Options, field) for field in vars(Options)}
    constants |= {key: x for key, x in getattr(obj, "__globals__", {}).items() if isinstance(x, int | float | str)}
    return tuple(
        text and re.sub(r"(?<= = )[\w.]+", lambda m: repr(constants[m[0]]) if m[0] in constants else m[0], text)
        for text in named
    )


def _fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What is said of a field names no type. Napoleon takes all up to a colon for one, in the first line: a comment."""
    if what == "attribute":
        lines[:0] = [".. field", ""]


def _types(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A type in a signature leads to the page of its public name, where there is one."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") == "py" and name in hessfn.__all__:
        domain, where = env.get_domain("py"), node["refdoc"]
        return domain.resolve_xref(env, where, app.builder, "obj", f"hessfn.{name}", node, content)
    return None


def _old_pages(app: Any, config: Any) -> None:
    """Pages of functions are generated; those of functions that are no more would fail the build."""
    reference = Path(app.srcdir, "api.md").read_text("utf-8")
    names = {f"hessfn.{name}.rst" for name in re.findall(r"^   ([\w.]+)$", reference, re.MULTILINE)}
    for page in Path(app.srcdir, "api").glob("*.rst"):
        if page.name not in names:
            page.unlink()


def setup(app: Any) -> None:
    app.connect("config-inited", _old_pages)
    app.connect("builder-inited", _font)
    app.connect("missing-reference", _types)
    app.connect("doctree-resolved", _signs)
    app.connect("autodoc-process-docstring", _fields, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _aliases)
    app.add_html_math_renderer("mathml", inline_renderers=(_math, None), block_renderers=(_math, None))
