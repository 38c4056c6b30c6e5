"""Problems that the command line names: a Python function, found, imported and called."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from hessfn.core.errors import InvalidInput, NotThere


def load_problem(spec: str, arguments: dict[str, Any]) -> Any:
    """What the function named by ``module:function`` or ``path/to/file.py:function`` returns for these arguments.

    Raises:
        ValueError: there is no such module, file or function, or it fails: the message has the line that did.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise InvalidInput(f"PROBLEM {spec!r} must be module:function or path/to/file.py:function")
    try:
        module = _import(where)
    except (Exception, SystemExit) as error:
        raise InvalidInput(f"PROBLEM {spec!r} cannot be imported: {_explain(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidInput(f"PROBLEM {spec!r}: there is no function {name!r} in {where}")
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
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


def _explain(error: BaseException) -> str:
    """An exception in one line, with the place in the problem's code where it came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and frames[-1].filename != __file__ else ""
    return f"{type(error).__name__}: {error}{place}"
