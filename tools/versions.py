"""What `make versions` runs: the oldest versions that pyproject.toml allows, and the newest that can be had.

python tools/versions.py constraints oldest    # the lower bounds, as constraints of pip
python tools/versions.py constraints 2.12      # a torch between the two
python tools/versions.py python newest         # the newest Python on this machine that pyproject.toml names
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")


def constraints(side: str) -> list[str]:
    """Of the oldest: every dependency at its lower bound. Of the newest: none, so that pip takes the newest.

    Of a number: that minor version of torch, and the newest of all else.
    """
    if side not in ("oldest", "newest"):
        return [f"torch=={side}.*"]
    required = [requirement.replace(">=", "==") for name in ("dependencies", "demo") for requirement in listed(name)]
    return [*required, "pyparsing<3.3"] if side == "oldest" else []  # newer ones warn matplotlib 3.8 of its own calls


def listed(name: str) -> list[str]:
    (found,) = re.findall(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', found)


def pythons() -> list[str]:
    """The versions of Python that are supported, the oldest first."""
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)


def python(side: str) -> str:
    """The interpreter to take: the oldest, or the newest, that runs here; for a number the one that runs this."""
    if side not in ("oldest", "newest"):
        return sys.executable
    versions = pythons() if side == "oldest" else pythons()[::-1]
    found = (
        path
        for version in versions
        for path in (f"python{version}", *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python")))
        if makes_environments(path)
    )
    return str(next(found, sys.executable))


def makes_environments(path: str | Path) -> bool:
    try:
        return subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    except OSError:
        return False


if __name__ == "__main__":
    what, side = sys.argv[1:]
    print("\n".join(constraints(side)) if what == "constraints" else python(side))
