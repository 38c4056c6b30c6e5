"""The directive ``from-notebook``: a picture out of an executed notebook, which is thus never older than the notebook.

Its argument is the notebook's name and some words of the picture's alternative text:

    ```{from-notebook} edge_of_stability, two largest eigenvalues
    ```
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective


def pictures(notebook: Path) -> dict[str, bytes]:
    """The PNG files in a notebook, by their alternative texts."""
    found = {}
    for cell in json.loads(notebook.read_text("utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                found[cell["metadata"]["mystnb"]["image"]["alt"]] = base64.b64decode(output["data"]["image/png"])
    return found


class FromNotebook(SphinxDirective):
    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"class": directives.class_option}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        name, _, words = self.arguments[0].partition(", ")
        notebook = Path(self.env.srcdir, "notebooks", f"{name}.ipynb")
        self.env.note_dependency(str(notebook))
        matching = {alt: png for alt, png in pictures(notebook).items() if words in alt}
        if len(matching) != 1:
            raise self.error(f"{len(matching)} pictures of {name} have the words {words!r} in their alternative text")
        ((alt, png),) = matching.items()
        file = Path(self.env.doctreedir, "pictures", f"{name}-{'-'.join(words.lower().split())}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
        where = Path(os.path.relpath(file, Path(self.env.doc2path(self.env.docname)).parent)).as_posix()
        return [nodes.image(uri=where, alt=alt, classes=self.options.get("class", []))]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("from-notebook", FromNotebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
