"""Makes a release, all but the upload, and leaves the files and their checksums in dist/.

`make release` runs it; RELEASING.md has the steps. `make dist` makes the files alone, of any commit, without the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "release"  # not the system's folder for temporary files, which may be small: torch is large
DIST = ROOT / "dist"
PYTHON = sys.executable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", action="store_true", help="of files that are not committed or not dated, too")
    parser.add_argument("--skip-tests", action="store_true", help="do not run the tests of the source distribution")
    options = parser.parse_args()
    version = declared_version(ROOT)
    if not options.draft:
        step(f"hessfn {version}: dated, committed, without a tag")
        stop_at([*what_disagrees(ROOT), *what_is_not_ready(version)])
    for folder in (BUILD, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    step("build")
    # The files in the archives have the time of the commit: the same commit gives the same bytes.
    run(PYTHON, "-m", "build", "--outdir", BUILD, ROOT, SOURCE_DATE_EPOCH=git("log", "-1", "--format=%ct"))
    (sdist,), (wheel,) = BUILD.glob("*.tar.gz"), BUILD.glob("*.whl")
    step("look at the files")
    run(PYTHON, "-m", "twine", "check", "--strict", sdist, wheel)
    run("check-wheel-contents", wheel)
    stop_at(what_is_missing(sdist, wheel))
    step("the tour of the README, from the wheel in an empty environment")
    environment = BUILD / "environment"
    run(PYTHON, "-m", "venv", environment)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    run(python, "-I", "-W", "error", ROOT / "tools" / "tour.py", ROOT / "README.md")
    shutil.rmtree(environment)
    if not options.skip_tests:
        step("the tests, from the source distribution")
        shutil.unpack_archive(sdist, BUILD / "unpacked")
        run("make", "-C", BUILD / "unpacked" / sdist.name.removesuffix(".tar.gz"), "test", f"PYTHON={PYTHON}")
        shutil.rmtree(BUILD / "unpacked")
    step("leave them in dist/")
    print(keep([sdist, wheel]), end="")


def declared_version(root: Path) -> str:
    """The one in pyproject.toml: `hessfn.__version__` reads what the installer has made of it."""
    found = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("pyproject.toml has no line 'version = \"...\"'")
    return found[1]


def what_disagrees(root: Path) -> list[str]:
    """Where version and date are not those of pyproject.toml and of the newest heading of the changelog."""
    version = declared_version(root)
    heading = re.search(r"^## (.+)$", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    newest = heading[1] if heading else "missing"
    dated = re.fullmatch(rf"{re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)", newest)
    if dated is None:
        remedy = f"make it '{version} (YYYY-MM-DD)', or change 'version' in pyproject.toml"
        return [f"the newest heading of CHANGELOG.md is '{newest}': {remedy}"]
    citation = (root / "CITATION.cff").read_text("utf-8").splitlines()
    wanted = [f"version: {version}", f"date-released: {dated[1]}"]
    return [f"CITATION.cff must have the line '{line}'" for line in wanted if line not in citation]


def what_is_not_ready(version: str) -> list[str]:
    changed = git("status", "--porcelain").splitlines()
    found = [f"not committed: {', '.join(line[3:] for line in changed)}"] if changed else []
    tag = f"v{version}"
    if git("tag", "--list", tag):
        found.append(f"there is a tag {tag} already: a version is released once")
    return found


def what_is_missing(sdist: Path, wheel: Path) -> list[str]:
    """Files that git keeps and a distribution lacks, and those that git does not keep, such as a compiled library."""
    kept = files_of_git()
    package = {name for name in kept if name.startswith("hessfn/")}
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
    found = []
    for file, has, wanted in ((sdist, packed - {"PKG-INFO"}, kept), (wheel, installed, package)):
        found += [f"{file.name} lacks {name}" for name in sorted(wanted - has)]
        found += [f"{file.name} has {name}, which git does not keep" for name in sorted(has - wanted)]
    if not wheel.stem.endswith("-py3-none-any"):
        found.append(f"{wheel.name} is for one platform: nothing may be compiled when it is built")
    return found


def files_of_git() -> set[str]:
    """Also those that are not committed yet, and those that a link to a folder leads to."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    files = {name for name in names if (ROOT / name).is_file()}
    for link in (name for name in names if (ROOT / name).is_dir()):
        behind = (ROOT / link).resolve().relative_to(ROOT).as_posix()
        files |= {f"{link}{name.removeprefix(behind)}" for name in names if name.startswith(f"{behind}/")}
    return files


def keep(files: list[Path]) -> str:
    """Moves them to dist/, with their checksums as `sha256sum --check` reads them, and returns these."""
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    for file in files:
        shutil.move(file, DIST)
    (DIST / "SHA256SUMS").write_text("".join(lines))
    return "".join(lines)


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True)
    return done.stdout.strip("\n")


def run(*command: str | Path, **environment: str) -> None:
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    path = os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", "")])
    status = subprocess.run(words, cwd=BUILD, env={**os.environ, "PATH": path, **environment}).returncode
    if status:
        raise SystemExit(f"{Path(words[0]).name} ended with status {status}: dist/ is empty")


def step(text: str) -> None:
    print(f"== {text}", flush=True)


def stop_at(problems: list[str]) -> None:
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
