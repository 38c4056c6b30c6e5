"""Completion of the command line in a shell: ``hessfn --print-completion bash`` prints the script for it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

SHELLS = ("bash", "zsh", "tcsh")
_FILES, _FOLDERS = {"PROBLEM", "FILE"}, {"A", "B", "C", "DIR"}  # as the help calls them


class PrintCompletion(argparse.Action):
    """Prints a shell's script, and ends. What the script offers is read off the parser."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=1, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('it needs shtab: pip install "hessfn[completion]"')
        for action in _arguments(parser):
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(parser, values[0]))
        parser.exit()


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All of a parser and of its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for subcommand in action.choices.values():
                yield from _arguments(subcommand)
