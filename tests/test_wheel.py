"""The wheel, in an environment that has the core dependencies and nothing else."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TOUR = """
import os, sys, torch
import hessfn as hf
assert "site-packages" in hf.__file__, hf.__file__
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
inputs, targets = torch.randn(6, 3), torch.randint(2, (6,))
loss, params = hf.functionalize(model, torch.nn.CrossEntropyLoss())
hvp = hf.hvp(loss, params, (inputs, targets))
eig = hf.eigsh(hvp, hf.gaussian(params, 1, seed=0)[0], k=5)
trace = hf.hutchinson(hvp, hf.rademacher(params, 100))
esd = hf.density(hf.slq(hvp, hf.gaussian(params, 10), num_matvecs=20))
import matplotlib
matplotlib.use("agg")
hf.plot.density_plot(esd)
assert eig.converged.all() and abs(torch.trapezoid(esd.values, esd.grid) - 1) < 1e-2
hf.show_config()
hf.report((model, torch.nn.CrossEntropyLoss(), [(inputs, targets)]), "out")  # jinja2 comes with torch
assert os.path.getsize("out/report.html") > 0
"""


def closure(name: str, found: set[str] | None = None) -> set[str]:
    """A distribution and all that it requires, without extras."""
    found = set() if found is None else found
    name = name.lower().replace("_", "-")
    if name not in found:
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                closure(requirement.name, found)
    return found


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python3*/site-packages")
    return found


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel; the core dependencies, gigabytes of them, are linked and not copied."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    for name in closure("hessfn") - {"hessfn"}:
        for file in importlib.metadata.files(name) or ():
            link = site_packages(environment) / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not link.is_symlink():
                link.symlink_to(Path(sys.prefix, "lib", link.parents[1].name, "site-packages", file.parts[0]))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("hessfn-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site_packages(environment), wheel], check=True)
    return environment


@pytest.mark.slow
def test_the_tour_runs_from_the_wheel_with_the_core_dependencies_alone(environment: Path, tmp_path: Path) -> None:
    run = [environment / "bin" / "python", "-I", "-W", "error", "-c", TOUR]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout


@pytest.mark.slow
def test_the_wheel_has_all_that_is_not_python(environment: Path) -> None:
    package = site_packages(environment) / "hessfn"
    others = "engine/README.md", "engine/conv3x3/kernel.c", "reporting/templates/report.html.j2", "data/digits.npz"
    for file in ("py.typed", *others):
        assert (package / file).is_file(), file


@pytest.mark.slow
def test_the_command_comes_with_the_wheel(environment: Path, tmp_path: Path) -> None:
    run = [environment / "bin" / "python", "-I", "-m", "hessfn", "--version"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"hessfn {importlib.metadata.version('hessfn')}\n", done.stderr
