"""The documentation runs as printed: the Python blocks of a page in order, in one namespace, and what they print.

Commands are parsed only: what they do is in the tests of the command line.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import torch.distributed as dist
from nets import classes, normal, seeded
from test_package import HOUSE, MAY_IMPORT
from torch import nn

import hessfn as hf
from hessfn.reporting import cli

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text("utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
}
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n?```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
COMMANDS = [
    (page, command)
    for page, text in sorted(PAGES.items())
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for command in block.splitlines()
]

# Pages for those who change the library. What they show is not to be run.
OF_THE_WORKSHOP = {"CONTRIBUTING.md", "docs/architecture.md", "docs/contract.md"}

# Run by a slow test, in test_callbacks.py: it needs packages of others, which warn.
ELSEWHERE = {"docs/howto/callbacks.md"}

TABLE_OF_PACKAGES = "docs/architecture.md", "| package | extra | for |"

# It is about what the reader has.
NOT_ALONE = {"README.md"}


def given_by_the_reader() -> dict[str, Any]:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)))
    return {"torch": torch, "model": model, "inputs": normal(20, 6), "targets": classes(20, 3)}


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
                assert (block[2] or "") == printed, f"{page}:{line}"
        plt.close("all")
        return names

    return run_page


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in sorted(PAGES)
        if BLOCK.search(PAGES[page]) and page not in {"README.md", *OF_THE_WORKSHOP, *ELSEWHERE}
    ],
)
def test_a_page_runs_as_printed(page: str, run: Callable[[str], dict[str, Any]]) -> None:
    run(page)


@pytest.mark.slow
def test_many_processes_print_what_one_does(tmp_path: Path) -> None:
    page = PAGES["docs/howto/many_processes.md"]
    blocks = list(BLOCK.finditer(page))
    (tmp_path / "shards.py").write_text("".join(block[1] for block in blocks), "utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "shards.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert run.stdout == "".join(block[2] or "" for block in blocks), run.stderr


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
            cli.command_parser().parse_args([word for word in words[words.index("hessfn") + 1 :] if word != "--help"])
        elif words[0] == "make":
            assert set(words[1:]) <= set(targets), f"{page}: {command}"
        elif words[0] == "torchrun":
            assert words[-1] in PAGES[page].replace(command, ""), f"{page} does not say what {words[-1]} is"
        elif words == [".ci/run"]:
            assert (ROOT / ".ci" / "run").is_file()
        elif words[0].startswith(".venv/bin/"):
            files = [word.split("::")[0] for word in words if ".py" in word]
            assert files and all((ROOT / file).is_file() for file in files), f"{page}: {command}"
        else:
            named = "".join(re.findall(r"\[(.*)\]", command)).split(",")
            assert words[:2] == ["pip", "install"] and set(named) - {""} <= set(extras), f"{page}: {command}"


def test_every_public_name_is_in_the_reference() -> None:
    described = re.findall(r"^(?:   |\.\. py:data:: )([\w.]+)$", PAGES["docs/api.md"], re.MULTILINE)
    assert len(described) == len(set(described))
    assert {*hf.__all__, *STUBS} - {*described, *(name.split(".")[0] for name in described)} == set()


# The site.


@pytest.mark.parametrize("page", sorted(page for page in PAGES if page.startswith("docs/")))
def test_lines_of_code_fit_the_column(page: str) -> None:
    """At most 98 letters are seen in a window 1400 wide; what is longer, a reader has to scroll for."""
    blocks = re.findall(r"^```\w+\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 98] == []


def test_every_notebook_is_among_the_tutorials_and_the_introduction_is_the_first() -> None:
    told = re.findall(r"<notebooks/(\w+)>", PAGES["docs/tutorials.md"])
    assert told[0] == "hessian_tutorial"
    assert sorted(told) == sorted(notebook.stem for notebook in ROOT.glob("notebooks/*.ipynb"))
    assert re.findall(r"^notebooks/(\w+)$", PAGES["docs/tutorials.md"], re.MULTILINE) == told


def test_pictures_of_the_front_page_are_in_the_notebooks() -> None:
    asked = re.findall(r"^```\{from-notebook\} (\w+), (.*)$", PAGES["docs/index.md"], re.MULTILINE)
    assert len(asked) >= 6
    for name, words in asked:
        cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
        told = [cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "") for cell in cells]
        assert sum(words in alt for alt in told) == 1, f"{words!r} in {name}"


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table with this head."""
    table = PAGES[page].partition(f"\n{head}\n")[2].partition("\n\n")[0]
    assert table, f"{page} has no table {head}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# The architecture.


def test_the_table_of_imports_is_the_one_that_is_tested() -> None:
    told: dict[str, set[str]] = {}
    for own, others in rows("docs/architecture.md", "| districts | may import |"):
        above, _, but = others.partition(" but ")
        named = set(told) - set(quoted(but)) if above == "every row above" else set(quoted(others))
        told |= dict.fromkeys(quoted(own), named)
    assert told == MAY_IMPORT


def test_every_folder_is_described() -> None:
    described = re.findall(r"^- `(\w+)` ", PAGES["docs/architecture.md"], re.MULTILINE)
    assert sorted(described) == sorted(name for name in MAY_IMPORT if "__" not in name)


@pytest.mark.parametrize("page", sorted(OF_THE_WORKSHOP))
def test_files_and_names_that_are_told_of_are_there(page: str) -> None:
    source = "".join(file.read_text("utf-8") for file in [*HOUSE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    for word in quoted(prose(page)):
        if re.fullmatch(r"(?!out/)[\w.]+/[\w./]*|[\w./]+\.(py|c|md|css|j2|toml)", word):
            assert (HOUSE / word).exists() or (ROOT / word).exists(), word
        elif re.fullmatch(r"_?[a-zA-Z]+(_[a-zA-Z]+)+", word):
            assert re.search(rf"\b{word}\b", source), word


def test_every_dependency_is_explained() -> None:
    """Of the package, of its extras and of its build: each once, under where it is asked for first."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    lists = re.findall(r"^(requires|dependencies) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    lists += re.findall(r"^(\w+) = \[(.*?)\]$", extras, re.MULTILINE | re.DOTALL)
    wanted: dict[str, set[str]] = {}
    for extra, listed in lists:
        of = {"requires": "build", "dependencies": "core"}.get(extra, extra)
        for package in re.findall(r'"([\w-]+)', listed):
            wanted.setdefault(package, set()).add(of)
    told = [(name, extra.strip("`")) for names, extra, _ in rows(*TABLE_OF_PACKAGES) for name in quoted(names)]
    assert sorted(name for name, _ in told) == sorted(wanted)
    assert [(name, extra) for name, extra in told if extra not in wanted[name]] == []


# The contract.


def stubs() -> dict[str, ast.FunctionDef]:
    """What the page says of functions, by their public names."""
    found = {}
    for block in re.findall(r"^```pyi\n(.*?)^```", PAGES["docs/contract.md"], re.DOTALL | re.MULTILINE):
        module = re.match(r"# hf\.(\w+\n)|", block)[1]
        for stub in ast.parse(block).body:
            assert isinstance(stub, ast.FunctionDef)
            found[f"{module.strip()}.{stub.name}" if module else stub.name] = stub
    return found


def found_under(name: str) -> Any:
    found: Any = hf
    for part in name.split("."):
        found = getattr(found, part)
    return found


STUBS = stubs()


@pytest.mark.parametrize("name", STUBS)
def test_a_signature_is_that_of_the_contract(name: str) -> None:
    stub, signature = STUBS[name], inspect.signature(found_under(name))
    plain = [p.replace(annotation=p.empty, default=shown(p.default)) for p in signature.parameters.values()]
    arguments = str(inspect.Signature(plain)).replace("Ellipsis", "...")
    (found,) = ast.parse(f"def {stub.name}{arguments}: ...").body
    assert ast.dump(found.args) == ast.dump(stub.args), f"docs/contract.md should have {stub.name}{arguments}"
    returned = {"T": "Tree"}.get(signature.return_annotation, signature.return_annotation).partition("[")[0]
    if returned in {*hf.__all__, "Tensor", "None", "dict", "list", "Sequence", "Axes"}:
        assert ast.unparse(stub.returns) == returned
    elif returned == "Callable":
        assert ast.unparse(stub.returns) in ("Callable", "MatVec")


def shown(default: Any) -> Any:
    return ... if inspect.isfunction(default) else default


def test_every_public_name_is_in_the_contract() -> None:
    told = {name.split(".")[0] for name in STUBS} | {
        re.split(r"\W", word)[0] for word in quoted(prose("docs/contract.md"))
    }
    assert set(dir(hf)) - told == set()


def test_the_fields_of_results_are_those_of_the_contract() -> None:
    told = {
        name: fields.split(", ")
        for name, fields in re.findall(r"^- `(\w+)\(([\w, ]+)\)`", PAGES["docs/contract.md"], re.MULTILINE)
    }
    found = {name: list(getattr(hf, name)._fields) for name in hf.__all__ if hasattr(getattr(hf, name), "_fields")}
    assert told == found


def test_the_errors_are_those_of_the_contract() -> None:
    for name, base, _ in rows("docs/contract.md", "| error | also a | when |"):
        kind = getattr(hf, quoted(name)[0])
        assert issubclass(kind, hf.HessfnError)
        assert quoted(base)[0] in [parent.__name__ for parent in kind.__mro__[1:]]


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
