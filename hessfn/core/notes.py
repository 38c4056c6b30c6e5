"""What a context knows of an error that passes through it: sentences that an error carries along (PEP 678)."""

from __future__ import annotations


def add_note(error: BaseException, note: str) -> None:
    """Adds a sentence, which Python 3.11 and later print below the error."""
    error.__notes__ = [*notes(error), note]  # type: ignore[attr-defined]  # add_note itself is of Python 3.11


def notes(error: BaseException) -> list[str]:
    """The sentences that an error carries."""
    return list(getattr(error, "__notes__", []))
