"""The source distribution, and the wheel in an environment that has the core dependencies and nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from tools_of import tool

ROOT = Path(__file__).parents[1]
VERSION = importlib.metadata.version("hessfn")
REPORT = """
import os, torch
import hessfn as hf
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
hf.show_config()
hf.report((model, torch.nn.CrossEntropyLoss(), [(torch.randn(6, 3), torch.randint(2, (6,)))]), "out")
assert os.path.getsize("out/report.html") > 0  # jinja2 comes with torch
"""
pytestmark = pytest.mark.slow


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
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "build", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode and re.search("No matching distribution|connection|Network", said):
        pytest.skip("hatchling, which builds the package, cannot be downloaded")
    assert done.returncode == 0, said
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel; the core dependencies, gigabytes of them, are linked and not copied."""
    environment = tmp_path_factory.mktemp("wheel") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    for name in closure("hessfn") - {"hessfn"}:
        for file in importlib.metadata.files(name) or ():
            link = site_packages(environment) / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not link.is_symlink():
                link.symlink_to(Path(sys.prefix, "lib", link.parents[1].name, "site-packages", file.parts[0]))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", site_packages(environment), built[1]], check=True)
    return environment


def run(environment: Path, where: Path, *words: str | Path) -> str:
    command = [environment / "bin" / "python", "-I", "-W", "error", *words]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tour_of_the_readme_runs_with_the_core_dependencies_alone(environment: Path, tmp_path: Path) -> None:
    said = run(environment, tmp_path, ROOT / "tools" / "tour.py", ROOT / "README.md")
    assert f"hessfn {VERSION} in {site_packages(environment) / 'hessfn'}" in said


def test_a_report_is_made_with_the_core_dependencies_alone(environment: Path, tmp_path: Path) -> None:
    assert "torch" in run(environment, tmp_path, "-c", REPORT)


def test_the_command_comes_with_the_wheel(environment: Path, tmp_path: Path) -> None:
    assert run(environment, tmp_path, "-m", "hessfn", "--version") == f"hessfn {VERSION}\n"
    assert (site_packages(environment) / "bin" / "hessfn").is_file()


def test_the_version_is_that_of_the_installed_package(environment: Path, tmp_path: Path) -> None:
    code = "import hessfn, sys; sys.exit(hessfn.__version__ != sys.argv[1])"
    run(environment, tmp_path, "-c", code, VERSION)


@pytest.fixture(scope="module")
def release() -> ModuleType:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: only git knows which files are the project's")
    return tool("release")


def test_the_distributions_have_every_file_and_nothing_that_was_compiled(
    release: ModuleType, built: tuple[Path, Path]
) -> None:
    assert release.what_is_missing(*built) == []
    with zipfile.ZipFile(built[1]) as archive:
        assert {f"hessfn/engine/{name}/kernel.c" for name in ("conv3x3", "flash_attention")} <= {*archive.namelist()}


def test_a_file_that_is_missing_or_compiled_is_found(
    release: ModuleType, built: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / built[1].name.replace("-any", "-linux_x86_64")
    with zipfile.ZipFile(built[1]) as archive, zipfile.ZipFile(other, "w") as changed:
        for name in set(archive.namelist()) - {"hessfn/engine/conv3x3/kernel.c"}:
            changed.writestr(name, archive.read(name))
        changed.writestr("hessfn/kernel.so", b"")
    lacks, has, platform = release.what_is_missing(built[0], other)
    assert "lacks hessfn/engine/conv3x3/kernel.c" in lacks
    assert "has hessfn/kernel.so" in has and "for one platform" in platform


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"hessfn-{VERSION}.dist-info/METADATA").decode())


def test_the_page_on_the_package_index_has_no_relative_link(built: tuple[Path, Path]) -> None:
    """A picture or a page that is not in the distribution, it can show by its full address only."""
    page, readme = metadata(built[1]).get_payload(), (ROOT / "README.md").read_text("utf-8")
    link = re.compile(r'(?:\]\(|<(?:img|a) [^>]*?(?:src|href)=")([^)"]+)')
    before, after = link.findall(readme), link.findall(page)
    assert len(before) == len(after) > 5
    for old, new in zip(before, after, strict=True):
        if re.match(r"[a-z]+:|#", old):
            assert new == old
        else:
            assert re.fullmatch(rf"https://\S+/(blob|raw)/v{re.escape(VERSION)}/{re.escape(old)}", new)
            assert (ROOT / old.partition("#")[0]).exists()
    blocks = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    assert blocks.findall(page) == blocks.findall(readme)


def test_the_wheel_says_where_the_project_is(built: tuple[Path, Path]) -> None:
    found = metadata(built[1])
    named = {line.partition(",")[0] for line in found.get_all("Project-URL", [])}
    assert {"Source", "Issues", "Changelog", "Documentation"} <= named
    assert found["License-Expression"] == "MIT" and found["License-File"] == "LICENSE"
