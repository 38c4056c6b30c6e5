"""Warnings at the user's line, however many of our own are between."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """A ``UserWarning`` at the first caller that is neither hessfn nor torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("hessfn", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)
