"""What a release needs: one version, one address, targets that CI can call, and a README whose links are complete."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from tools_of import tool

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
(ADDRESS,) = re.findall(r'^Source = "(.+)"$', PROJECT, re.MULTILINE)
TEXTS = {".md", ".toml", ".cff", ".yml", ".py"}


@pytest.fixture(scope="module")
def release() -> ModuleType:
    return tool("release")


def files() -> list[Path]:
    """Those that a person writes; not what was built or installed."""
    folders = [ROOT, *(ROOT / name for name in (".github", "docs", "hessfn", "notebooks", "tools"))]
    found = [file for folder in folders for file in (folder.glob("*") if folder == ROOT else folder.rglob("*"))]
    return [file for file in found if file.suffix in TEXTS and file.is_file()]


def test_the_project_has_one_address() -> None:
    host, _, name = ADDRESS.rsplit("/", 2)
    own = re.compile(rf"{re.escape(host)}/[\w-]+/{re.escape(name)}\b")
    found = {(file.name, url) for file in files() for url in own.findall(file.read_text("utf-8"))}
    assert {url for _, url in found} == {ADDRESS}, found
    assert {"pyproject.toml", "CITATION.cff", "config.yml", "RELEASING.md"} <= {name for name, _ in found}


def test_version_and_date_of_a_release_must_agree(release: ModuleType, tmp_path: Path) -> None:
    def left_over(version: str, heading: str, *citation: str) -> list[str]:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## 0.0.9 (2025-01-01)\n")
        (tmp_path / "CITATION.cff").write_text("\n".join(citation))
        return release.what_disagrees(tmp_path)

    right = "version: 0.1.0", "date-released: 2026-12-01"
    assert left_over("0.1.0", "0.1.0 (2026-12-01)", *right) == []
    assert "'0.1.0 (unreleased)'" in left_over("0.1.0", "0.1.0 (unreleased)", *right)[0]
    assert "'0.1.0 (2026-12-01)'" in left_over("0.2.0", "0.1.0 (2026-12-01)", *right)[0]
    assert "'version: 0.1.0'" in left_over("0.1.0", "0.1.0 (2026-12-01)", "version: 0.0.9", right[1])[0]
    assert "'date-released: 2026-12-01'" in left_over("0.1.0", "0.1.0 (2026-12-01)", right[0])[0]


def test_the_citation_is_of_this_version(release: ModuleType) -> None:
    lines = (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    assert f"version: {release.declared_version(ROOT)}" in lines and f"repository-code: {ADDRESS}" in lines


def test_the_readme_leads_to_the_files_of_its_version_on_the_package_index() -> None:
    """What the substitutions of pyproject.toml make of it; tests/test_wheel.py looks at the built one."""
    pairs = re.findall(r"^pattern = '(.+)'\nreplacement = '(.+)'$", PROJECT, re.MULTILINE)
    assert len(pairs) == 2

    def shown(text: str) -> str:
        for pattern, replacement in pairs:
            text = re.sub(pattern, replacement.replace("$HFPR_VERSION", "1.2.3"), text)
        return text

    assert shown("[a](docs/a.md#b)") == f"[a]({ADDRESS}/blob/v1.2.3/docs/a.md#b)"
    assert shown("![a](docs/a.png)") == f"![a]({ADDRESS}/raw/v1.2.3/docs/a.png)"
    both = f"[![a]({ADDRESS}/raw/v1.2.3/docs/a.png)]({ADDRESS}/blob/v1.2.3/docs/a.md)"
    assert shown("[![a](docs/a.png)](docs/a.md)") == both
    assert shown('<img width="9" src="a.png">') == f'<img width="9" src="{ADDRESS}/raw/v1.2.3/a.png">'
    for same in ("[a](https://a.org)", "[a](#part)", "[a](mailto:a@b.org)"):
        assert shown(same) == same


def test_ci_calls_the_targets_that_there_are() -> None:
    targets = set(re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)[0].split())
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    called = set(re.findall(r"run: make (\w[\w-]*)", workflow)) | set(re.findall(r"target: (\w[\w.-]*)", workflow))
    called |= {name for names in re.findall(r"target: \[(.+)\]", workflow) for name in names.split(", ")}
    versions = {name for name in called if re.fullmatch(r"versions-(oldest|newest|\d+\.\d+)", name)}
    assert {"test", "slow", "check", "docs", "dist", "nightly"} <= called - versions <= targets


def test_ci_runs_every_torch_between_the_bounds() -> None:
    (oldest,) = re.findall(r'"torch>=2\.(\d+)"', PROJECT)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    between = [int(minor) for minor in re.findall(r"target: versions-2\.(\d+) ", workflow)]
    assert between == list(range(int(oldest) + 1, int(oldest) + 1 + len(between)))
    newest = re.findall(r"torch 2\.\d+ to 2\.(\d+)", (ROOT / "CHANGELOG.md").read_text("utf-8"))[0]
    assert between[-1] + 1 == int(newest)
    assert workflow.count("target: versions-oldest") == 1


def test_ci_runs_every_python_that_the_package_claims() -> None:
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8")
    (run,) = re.findall(r"python: \[(.+)\]", workflow)
    assert re.findall(r"[\d.]+", run) == claimed
    assert f'requires-python = ">={claimed[0]}"' in PROJECT


def test_a_release_is_not_made_of_what_is_not_committed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    done = subprocess.run([sys.executable, ROOT / "tools" / "release.py"], capture_output=True, text=True)
    unreleased = "(unreleased)" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert not unreleased or (done.returncode == 1 and "make it" in done.stderr)
