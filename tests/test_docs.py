"""The documentation runs as printed: the Python blocks of a page in order, in one namespace, and what they print.

Commands are parsed only: what they do is in the tests of the command line.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from nets import classes, normal, seeded
from torch import nn

import hessfn as hf
from hessfn.reporting import cli

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8") for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
COMMANDS = [
    (page, command)
    for page, text in sorted(PAGES.items())
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for command in block.splitlines()
]

# Pages that are about what the reader has.
NOT_ALONE = {"README.md", "docs/howto/many_processes.md"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.out = nn.Sequential(nn.Linear(6, 12), nn.Tanh()), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.blocks(x))


def given_by_the_reader() -> dict[str, Any]:
    model, criterion, batch = seeded(Net), nn.CrossEntropyLoss(), (normal(20, 6), classes(20, 3))
    given = {"torch": torch, "model": model, "criterion": criterion, "inputs": batch[0], "targets": batch[1]}
    return {**given, "batch": batch, "plain_loss": hf.functionalize(seeded(Net), criterion)[0]}


@pytest.fixture
def _world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torchrun starts a process that has no other beside it."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _world_of_one: None
) -> Callable[[str], dict[str, Any]]:
    """Runs a page, in a folder of its own, and returns what it leaves behind."""

    def run_page(page: str) -> dict[str, Any]:
        blocks = list(BLOCK.finditer(PAGES[page]))
        for module in re.findall(r"^import (\w+)", "".join(block[1] for block in blocks), re.MULTILINE):
            pytest.importorskip(module)
        monkeypatch.chdir(tmp_path)
        names = given_by_the_reader() if page in NOT_ALONE else {}
        with torch.random.fork_rng(devices=[]):
            for block in blocks:
                line = PAGES[page].count("\n", 0, block.start()) + 1
                exec(compile("\n" * line + block[1], ROOT / page, "exec"), names)
                printed = capsys.readouterr().out
                assert block[2] in (None, printed), f"{page}:{line}"
        plt.close("all")
        return names

    return run_page


@pytest.mark.parametrize("page", sorted(page for page in PAGES if BLOCK.search(PAGES[page]) and page != "README.md"))
def test_a_page_runs_as_printed(page: str, run: Callable[[str], dict[str, Any]]) -> None:
    run(page)


def test_the_readme_runs_as_printed_and_is_right(run: Callable[[str], dict[str, Any]]) -> None:
    names = run("README.md")
    exact = torch.linalg.eigvalsh(hf.dense(names["hvp"], names["params"]))
    largest = exact[exact.abs().argsort(descending=True)][:5]
    assert ((names["eig"].values - largest).abs() <= names["eig"].residuals + 1e-9).all()
    assert (names["trace"].mean - exact.sum()).abs() <= 4 * names["trace"].stderr


def test_commands_are_ones_that_there_are() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert COMMANDS
    for page, command in COMMANDS:
        words = shlex.split(command, comments=True)
        if "hessfn" in words:
            cli._parser().parse_args([word for word in words[words.index("hessfn") + 1 :] if word != "--help"])
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), f"{page}: {command}"
        else:
            named = "".join(re.findall(r"\[(.*)\]", command)).split(",")
            assert words[:2] == ["pip", "install"] and set(named) - {""} <= set(extras), f"{page}: {command}"


def test_every_public_name_is_in_the_reference() -> None:
    described = re.findall(r"^\.\. (?:auto\w+|py:data):: (?:hessfn\.)?([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert (
        set(hf.__all__)
        - {name.removeprefix("losses.").removeprefix("plotting.").removeprefix("core.") for name in described}
        == set()
    )


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
