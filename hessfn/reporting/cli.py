"""The ``hessfn`` command."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

# No more than the words of the command line: what computes, and torch with it, is loaded by the functions that do.
from hessfn.reporting.options import DATA, OUTPUT, WORK, Options

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
    """Runs the command and returns its exit code: 0, 2 after an error in one line, 130 when interrupted."""
    arguments = command_parser().parse_args(argv)
    try:
        if arguments.subcommand == "compare":
            _compare(arguments)
        else:
            given = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
            _report(arguments, shlex.join(["hessfn", *given]))  # what gives the same report, killed or not
    except KeyboardInterrupt:
        print(f"\nhessfn: interrupted, no report was written{_what_is_left(arguments.out)}", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if arguments.traceback:
            traceback.print_exc()
        left = "" if isinstance(error, ValueError | ImportError) else _what_is_left(arguments.out)
        print(f"hessfn: error: {' '.join(str(error).split())}{left}", file=sys.stderr)
        return 2
    return 0


def _compare(arguments: argparse.Namespace) -> None:
    from hessfn.reporting import compare
    from hessfn.reporting.side import read

    result = compare.compare(arguments.a, arguments.b, arguments.out)
    sides = read(arguments.a), read(arguments.b)
    print(f"{compare.summary(*sides, result)}\n\npage: {arguments.out}")


def _report(arguments: argparse.Namespace, command: str) -> None:
    from hessfn.parallel.all_reduce import launched
    from hessfn.reporting import html, text
    from hessfn.reporting.loading import load_problem
    from hessfn.reporting.run import run

    given = {option.name: getattr(arguments, option.name) for option in _OPTIONS if hasattr(arguments, option.name)}
    html.template()  # asked for now, so that a missing extra is said before a net is trained
    with launched(arguments.timeout) as group:
        options = Options(name=arguments.problem, command=command, group=group, **given)
        if not options.is_first_process:
            warnings.simplefilter("ignore")
        problem = load_problem(arguments.problem, dict(arguments.set))
        result = run(problem, Path(arguments.out), options)
        if options.is_first_process:
            print(f"{text.summary(result)}\n\nreport: {Path(arguments.out) / 'report.html'}")


def _what_is_left(out: str) -> str:
    from hessfn.reporting.workspace import num_products

    num = num_products(Path(out))
    return f"; {num} products are kept, --resume goes on from there" if num else ""


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hessfn", description="What the curvature of a PyTorch loss looks like, and how sure one can be."
    )
    parser.add_argument("--version", action="version", version=f"hessfn {importlib.metadata.version('hessfn')}")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    _add_compare(commands)
    _add_report(commands)
    return parser


def _add_compare(commands: Any) -> None:
    text = "two reports side by side, and where they differ by more than the errors"
    command = commands.add_parser("compare", help=text, description=f"{text.capitalize()}: one page and a summary.")
    command.add_argument("a", metavar="A", help="a folder that hessfn report has written")
    command.add_argument("b", metavar="B", help="another one")
    command.add_argument("--out", default="compare.html", metavar="FILE", help="the page (default: %(default)s)")
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
    groups[OUTPUT].add_argument("--out", default="hessfn-report", metavar="DIR", help=text)
    for option in _OPTIONS:
        _add_option(groups[option.metadata["group"]], option)
    text = "how long a process started by torchrun waits for the others (default: %(default)s)"
    groups[WORK].add_argument("--timeout", type=float, default=600, metavar="SECONDS", help=text)
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
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
