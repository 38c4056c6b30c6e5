"""The ``hessfn`` command."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hessfn.core.errors import InvalidInput, NotThere
from hessfn.parallel.all_reduce import launched
from hessfn.reporting import compare, html, text
from hessfn.reporting.run import report
from hessfn.reporting.workspace import num_products

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
  hessfn report my_package.my_module:trained -k 20 --probes 400 --dtype float64
  hessfn report my_problem.py:trained --params "layer4.*" --params "fc.*"
  hessfn report hessfn.problems:digits --set seed=1 --set num_images=1797
  hessfn report hessfn.problems:cifar10_resnet20 --set weights=net.pth --set data=DIR
  torchrun --nproc-per-node 2 -m hessfn report my_problem.py:trained
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 2 after an error in one line, 130 when interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "compare":
            return _compare(arguments)
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


def _compare(arguments: argparse.Namespace) -> int:
    result = compare.compare(arguments.a, arguments.b, arguments.out)
    sides = compare.read(arguments.a), compare.read(arguments.b)
    print(f"{compare.summary(*sides, result)}\n\npage: {arguments.out}")
    return 0


def _report(arguments: argparse.Namespace, command: str) -> None:
    options = vars(arguments).copy()
    for not_for_report in ("command", "problem", "set", "traceback", "timeout"):
        del options[not_for_report]
    options.update(name=arguments.problem, command=command, params=arguments.params or "*")
    html.template()  # a missing extra is said before a net is trained
    with launched(arguments.timeout) as group:
        speaks = group is None or group.rank() == 0
        if not speaks:
            warnings.simplefilter("ignore")
        problem = load_problem(arguments.problem, dict(arguments.set))
        result = report(problem, group=group, **options)
        if speaks:
            print(f"{text.summary(result)}\n\nreport: {Path(arguments.out) / 'report.html'}")


def _what_is_left(out: str) -> str:
    num = num_products(Path(out))
    return f"; {num} products are kept, --resume goes on from there" if num else ""


def load_problem(spec: str, options: dict[str, Any]) -> Any:
    """What the function named by ``module:function`` or ``path/to/file.py:function`` returns, called with options.

    Raises:
        ValueError: there is no such module, file or function, or it fails: the message has the line that did.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise InvalidInput(f"PROBLEM {spec!r} must be module:function or path/to/file.py:function")
    try:
        module = _import(where)
    except Exception as error:
        raise InvalidInput(f"PROBLEM {spec!r} cannot be imported: {_explain(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidInput(f"PROBLEM {spec!r}: there is no function {name!r} in {where}")
    try:
        return function(**options)
    except Exception as error:
        raise InvalidInput(f"PROBLEM {spec!r} failed: {_explain(error)}") from error


def _import(where: str) -> ModuleType:
    if not where.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))  # as "python -m module" does
        return importlib.import_module(where)
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise NotThere(f"there is no file {where!r}")
    sys.path.insert(0, str(path.parent))  # as "python file.py" does
    name = f"hessfn_problem_{path.stem}"  # a file of any name: it must not be mistaken for an installed module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _explain(error: Exception) -> str:
    """An exception in one line, with the place in the problem's code where it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and frames[-1].filename != __file__ else ""
    return f"{type(error).__name__}: {error}{place}"


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not value or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _add_compare(commands: Any) -> None:
    text = "two reports side by side, and where they differ by more than the errors"
    command = commands.add_parser("compare", help=text, description=f"{text.capitalize()}: one page and a summary.")
    command.add_argument("a", metavar="A", help="a folder that hessfn report has written")
    command.add_argument("b", metavar="B", help="another one")
    command.add_argument("--out", default="compare.html", metavar="FILE", help="the page (default: %(default)s)")
    command.add_argument("--traceback", action="store_true", help="after an error, show where in the code it came from")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hessfn", description="What the curvature of a PyTorch loss looks like, and how sure one can be."
    )
    parser.add_argument("--version", action="version", version=f"hessfn {importlib.metadata.version('hessfn')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compare(commands)
    command = commands.add_parser(
        "report",
        help="eigenvalues, trace, spectral density and landscape of a loss, on one page",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = f"module:function or path/to/file.py:function (default: {_DEFAULT})"
    command.add_argument("problem", nargs="?", default=_DEFAULT, metavar="PROBLEM", help=text)

    add = command.add_argument_group("what to look at").add_argument
    text = "an argument for PROBLEM, as in seed=1; may be repeated"
    add("--set", action="append", type=_setting, default=[], metavar="NAME=VALUE", help=text)
    text = "the parameters whose names match, the others being constants; may be repeated (default: all)"
    add("--params", action="append", metavar="PATTERN", help=text)
    add("--num-batches", type=int, metavar="N", help="the first N batches (default: all)")
    add("--dtype", metavar="TYPE", help="float64, float32, ... (default: the model's)")
    add("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: the model's)")

    add = command.add_argument_group("how much to compute").add_argument
    add("-k", "--k", type=int, default=5, metavar="N", help="eigenvalues (default: %(default)s)")
    text = "those of largest magnitude, the largest, the smallest, or from both ends (default: %(default)s)"
    add("--which", choices=["LM", "LA", "SA", "BE"], default="LM", help=text)
    text = "residual of an eigenvalue at which it is good, relative to it (default: %(default)s)"
    add("--rtol", type=float, default=1e-3, metavar="X", help=text)
    text = "random vectors for the trace, one product each (default: %(default)s)"
    add("--probes", type=int, default=100, metavar="N", help=text)
    text = "random vectors for the traces of activations, a product with each batch; 0 for none (default: %(default)s)"
    add("--activations", type=int, default=30, metavar="N", help=text)
    add("--runs", type=int, default=4, metavar="N", help="Lanczos runs for the density (default: %(default)s)")
    add("--steps", type=int, default=60, metavar="N", help="products in each of these runs (default: %(default)s)")
    text = "how far the landscape goes each way (default: to about ten times the loss along the top eigenvector)"
    add("--radius", type=float, metavar="X", help=text)
    text = "points each way of the plane over the top two eigenvectors, 0 for no plane (default: %(default)s)"
    add("--plane", type=int, default=15, metavar="N", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of all random vectors (default: %(default)s)")

    text = "how long a process started by torchrun waits for the others (default: %(default)s)"
    add("--timeout", type=float, default=600, metavar="SECONDS", help=text)

    add = command.add_argument_group("output").add_argument
    add("--out", default="hessfn-report", metavar="DIR", help="made if it is not there (default: %(default)s)")
    text = "go on with a report that was killed; other options may be others now, but not the parameters and the data"
    add("--resume", action="store_true", help=text)
    text = "keep no products in DIR/.unfinished meanwhile, each as many bytes as the parameters: nothing to resume"
    add("--no-journal", dest="journal", action="store_false", help=text)
    add("--traceback", action="store_true", help="after an error, show where in the code it came from")
    return parser
