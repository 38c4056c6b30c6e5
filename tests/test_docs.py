"""The documentation runs as printed: the Python blocks of a page in order, in one namespace, and what they print."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from nets import classes, normal, seeded

import hessfn as hf

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def given_by_the_reader() -> dict[str, Any]:
    model = seeded(lambda: torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)))
    return {"torch": torch, "model": model, "inputs": normal(20, 6), "targets": classes(20, 3)}


@pytest.mark.parametrize("page", sorted(page for page in PAGES if BLOCK.search(PAGES[page])))
def test_a_page_runs_as_printed(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in set(re.findall(r"^import (\w+)", "".join(b[1] for b in BLOCK.finditer(PAGES[page])), re.MULTILINE)):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    names = given_by_the_reader() if page == "README.md" else {}
    with torch.random.fork_rng(devices=[]):
        for block in BLOCK.finditer(PAGES[page]):
            line = PAGES[page].count("\n", 0, block.start()) + 1
            exec(compile("\n" * line + block[1], ROOT / page, "exec"), names)
            printed = capsys.readouterr().out
            assert block[2] in (None, printed), f"{page}:{line}"
    plt.close("all")


def test_every_public_name_is_in_the_reference() -> None:
    described = re.findall(r"^\.\. (?:auto\w+|py:data):: (?:hessfn\.)?([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert set(hf.__all__) - set(described) == set()


@pytest.mark.parametrize("peer", ["pyhessian", "curvlinops", "hessian_eigenthings"])
def test_the_peers_have_what_their_page_names(peer: str) -> None:
    named = set(re.findall(rf"{peer}\.([\w.]+)", PAGES["docs/coming_from.md"]))
    assert named
    pytest.importorskip(peer)
    for path in named:
        found = importlib.import_module(peer)
        for part in path.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_between_files_lead_somewhere(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.DOTALL)
    links = re.findall(r"\]\((?!\w+:)([^)#]+)", prose)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
