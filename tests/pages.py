"""What the tests ask of pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
from matplotlib.colors import to_rgb


class Parsed(HTMLParser):
    """Tags with their attributes, and the text that is shown, scripts and styles left out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.shown = ""
        self._inside: tuple[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs).get("id")) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.shown += data
        elif self._inside[0] == "script":
            self.scripts[self._inside[1]] = data

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag == "img"]

    @property
    def links(self) -> list[str | None]:
        return [attrs[name] for _, attrs in self.tags for name in ("src", "href", "srcset") if name in attrs]


def contrast(one: object, other: object) -> float:
    """As WCAG 2.2 has it, from 1 to 21."""

    def luminance(color: object) -> float:
        channels = np.array(to_rgb(color))
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def palettes(css: str) -> list[dict[str, str]]:
    """The custom properties of every ``:root``: light, then dark."""
    return [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)]
