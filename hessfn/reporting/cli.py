"""The ``hessfn`` command."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import math
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from hessfn.core.notes import notes

# No more than the words of the command line: what computes, and torch with it, is loaded by the functions that do.
from hessfn.reporting.completion import SHELLS, PrintCompletion
from hessfn.reporting.options import DATA, OUTPUT, WORK, Options
from hessfn.reporting.terminal import ended_in_order, in_one_line, printable, rank, say

_OPTIONS = [option for option in fields(Options) if option.metadata["group"]]
_TRACEBACK = "after an error, show where in the code it came from"
_DEFAULT = "hessfn.problems:digits"
_DESCRIPTION = """\
Eigenvalues, trace, spectral density and landscape of a loss, each with its error.
Prints a summary, and writes report.html (one page that needs no other file),
report.json (all numbers) and the figures as PNG.
"""
_EXAMPLES = """\
PROBLEM is a Python function that returns (model, criterion, batches):

    # my_problem.py
    def trained():
        model = Net()
        model.load_state_dict(torch.load("net.pth", weights_only=True))
        return model.eval(), torch.nn.CrossEntropyLoss(), DataLoader(data, batch_size=128)

criterion(model(inputs), targets) is the mean loss of a batch (inputs, targets).
Every pass over the batches must give the same data: no shuffling, no random
augmentation. PROBLEM is code, and it is run.

examples:
  hessfn report                                 a small net, trained on handwritten digits
  hessfn report my_problem.py:trained --out trained
  hessfn report my_package.my_module:trained -k 20 --num-probes 400 --dtype float64
  hessfn report my_problem.py:trained --params "layer4.*" --params "fc.*"
  hessfn report hessfn.problems:digits --set seed=1 --set num_images=1797
  hessfn report hessfn.problems:cifar10_resnet20 --set weights=net.pth --set data=DIR
  torchrun --nproc-per-node 2 -m hessfn report my_problem.py:trained
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 after an error in one line, 130 or 143 when interrupted."""
    words = [*sys.argv[1:]] if argv is None else [*argv]
    arguments = command_parser().parse_args(_joined(words))
    received: list[int] = []
    try:
        with ended_in_order() as received:
            if arguments.subcommand == "compare":
                _compare(arguments)
            else:
                # What gives the same report, killed or not.
                _report(arguments, shlex.join(["hessfn", *(word for word in words if word != "--resume")]))
    except KeyboardInterrupt as error:
        what = "page" if arguments.subcommand == "compare" else "report"
        how = "ended by SIGTERM" if received else "interrupted"
        said = "; ".join([f"{how}, no {what} was written", *notes(error)])
        say(f"{'' if received else chr(10)}hessfn: {rank()}{said}", sys.stderr)  # after the ^C that a terminal shows
        return 143 if received else 130
    except BrokenPipeError:  # nobody reads on, as after `| head`
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if arguments.traceback:
            traceback.print_exc()
        say(f"hessfn: error: {rank()}{in_one_line(error)}", sys.stderr)
        return 2
    return 0


def _compare(arguments: argparse.Namespace) -> None:
    from hessfn.reporting import compare

    folders = [arguments.a, arguments.b, *arguments.others]
    result = compare.compare(*folders, out=arguments.out)
    say(f"{compare.summary(result)}\n\npage: {arguments.out}")


def _report(arguments: argparse.Namespace, command: str) -> None:
    from hessfn.parallel.launch import launched
    from hessfn.reporting import html, text
    from hessfn.reporting.loading import load_problem
    from hessfn.reporting.run import run

    given = {option.name: getattr(arguments, option.name) for option in _OPTIONS if hasattr(arguments, option.name)}
    html.template()  # asked for now, so that a missing extra is said before a net is trained
    with launched(arguments.timeout) as group:
        # A page and JSON are UTF-8, which not every argument is.
        options = Options(name=printable(arguments.problem), command=printable(command), group=group, **given)
        if not options.is_first_process:
            warnings.simplefilter("ignore")
        problem = load_problem(arguments.problem, dict(arguments.set))
        result = run(problem, Path(arguments.out), options)
        if options.is_first_process:
            say(f"{text.summary(result)}\n\nreport: {Path(arguments.out) / 'report.html'}")


class _Parser(argparse.ArgumentParser):
    """One that says an error in one line."""

    def error(self, message: str) -> NoReturn:
        said = printable(" ".join(message.split()))
        self.exit(2, f"hessfn: error: {said} ({self.prog} --help lists what there is)\n")


def command_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hessfn", description="The curvature of a PyTorch loss, with an error for every number.")
    parser.add_argument("--version", action="version", version=f"hessfn {importlib.metadata.version('hessfn')}")
    text = "print the script that completes this command in a shell (needs shtab)"
    parser.add_argument("--print-completion", action=PrintCompletion, choices=SHELLS, help=text)
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_report(commands)
    return parser


def _joined(words: Sequence[str]) -> list[str]:
    """Joins an option and a negative number, ``--rtol -1e-3``, as argparse takes the second for an option."""
    joined: list[str] = []
    for word in words:
        option = bool(joined) and joined[-1].startswith("-") and "=" not in joined[-1] and joined[-1] != "--"
        if option and re.fullmatch(r"-(\d.*|\.\d.*|inf|nan)", word, re.IGNORECASE) and "--" not in joined:
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def _add_compare(commands: Any) -> None:
    text = "reports side by side, and where they differ by more than the errors"
    command = commands.add_parser("compare", help=text, description=f"{text.capitalize()}: one page and a summary.")
    command.add_argument("a", type=_name, metavar="A", help="a folder that hessfn report has written")
    command.add_argument("b", type=_name, metavar="B", help="another one")
    command.add_argument("others", type=_name, nargs="*", metavar="C", help="and others, as along a training")
    text = "the page (default: %(default)s)"
    command.add_argument("--out", type=_name, default="compare.html", metavar="FILE", help=text)
    command.add_argument("--traceback", action="store_true", help=_TRACEBACK)


def _add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="eigenvalues, trace, spectral density and landscape of a loss, on one page",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = f"module:function or path/to/file.py:function (default: {_DEFAULT})"
    command.add_argument("problem", nargs="?", default=_DEFAULT, metavar="PROBLEM", help=text)
    groups = {title: command.add_argument_group(title) for title in (DATA, WORK, OUTPUT)}
    text = "an argument for PROBLEM, as in seed=1; may be repeated"
    groups[DATA].add_argument("--set", action="append", type=_setting, default=[], metavar="NAME=VALUE", help=text)
    text = "made if it is not there (default: %(default)s)"
    groups[OUTPUT].add_argument("--out", type=_name, default="hessfn-report", metavar="DIR", help=text)
    for option in _OPTIONS:
        _add_option(groups[option.metadata["group"]], option)
    text = "how long a process started by torchrun waits for the others (default: %(default)s)"
    groups[WORK].add_argument("--timeout", type=_seconds, default=600, metavar="SECONDS", help=text)
    groups[OUTPUT].add_argument("--traceback", action="store_true", help=_TRACEBACK)


def _add_option(group: Any, option: Any) -> None:
    """An argument for a field of Options. One that is not given is left to the field's default."""
    flag, text = option.name.replace("_", "-"), option.metadata["help"]
    how = {"dest": option.name, "default": argparse.SUPPRESS, **option.metadata["argument"]}
    if option.default is True:
        group.add_argument(f"--no-{flag}", action="store_false", help=text, **how)
    elif option.default is False:
        group.add_argument(f"--{flag}", action="store_true", help=text, **how)
    else:
        shown = "" if "default:" in text else f" (default: {option.default})"
        group.add_argument(f"--{flag}" if len(flag) > 1 else f"-{flag}", help=text + shown, **how)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not value or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    try:
        with warnings.catch_warnings():  # of a backslash in what is no Python, say
            warnings.simplefilter("ignore")
            return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value


def _name(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file or folder")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} must be a positive number of seconds, less than 1e9")
    return seconds
