"""What is loaded when: `import hessfn`, its names, and the command that is asked for no more than its words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hessfn as hf

DOOR = Path(hf.__file__)
SLOW_TO_LOAD = ["scipy", "matplotlib", "transformers", "torchvision", "sklearn", "pandas", "torch._dynamo", "sympy"]


def python(*words: str, **environment: str) -> str:
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment or None).stdout


def test_names_are_loaded_from_where_type_checkers_see_them() -> None:
    (block,) = (n for n in ast.parse(DOOR.read_text("utf-8")).body if ast.unparse(n).startswith("if TYPE_CHECKING"))
    seen = {alias.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert sorted(seen) == sorted(hf.__all__)
    for name, module in seen.items():
        home = __import__(module, fromlist=[name])
        assert getattr(hf, name) is getattr(home, name)


def test_the_names_of_before_still_lead_somewhere() -> None:
    assert hf.Way is hf.Mode and hf.choose_way is hf.find_mode


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment in which to import torch is an error."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    return {"PYTHONPATH": f"{tmp_path}:{DOOR.parents[1]}", "HOME": str(tmp_path), "COLUMNS": "80"}


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["report", "--help"], ["compare", "--help"]], ids=" ".join
)
def test_the_command_says_its_words_without_torch(
    words: list[str], without_torch: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "hessfn"  # as pip writes it
    script.write_text("import sys\nfrom hessfn.reporting.cli import main\nsys.exit(main())\n")
    for command in (["-m", "hessfn"], ["-mhessfn"], [str(script)]):
        said = python(*command, *words, **without_torch)
        assert said.startswith("hessfn 0." if words == ["--version"] else "usage: hessfn")


@pytest.mark.slow
def test_a_program_of_any_other_name_has_torch_with_hessfn(tmp_path: Path) -> None:
    for name in ("train.py", "hessfn_runs.py"):
        (tmp_path / name).write_text("import hessfn, sys\nassert 'torch' in sys.modules\n")
        python(str(tmp_path / name), "hessfn")


def test_nothing_slow_is_loaded_that_is_not_asked_for() -> None:
    names = [name for name in hf.__all__ if name not in ("report", "compare")]
    code = f"import torch, sys; had = set(sys.modules); import hessfn; [getattr(hessfn, x) for x in {names}]\n"
    code += f"print([x for x in {SLOW_TO_LOAD} if x in sys.modules and x not in had])"
    assert python("-c", code) == "[]\n"


@pytest.mark.slow
def test_an_import_takes_at_most_three_tenths_of_a_second_more_than_torch() -> None:
    code = "import time, torch; start = time.process_time(); import hessfn; print(time.process_time() - start)"
    assert min(float(python("-c", code)) for _ in range(3)) <= 0.3
