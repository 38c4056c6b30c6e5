"""Completion of the command line: what the printed script offers in a shell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hessfn.reporting.cli import main

# What readline does at Tab: it tells the function the words, and where the cursor is.
AT_TAB = """
source ./hessfn.bash
COMP_WORDS=(%s); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_shtab_hessfn 2>/dev/null; printf '%%s\\n' "${COMPREPLY[@]}"
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("hessfn rep", {"report"}),
        ("hessfn report --rtol", {"--rtol", "--rtol-trace"}),
        ("hessfn report --which ''", {"LM", "LA", "SA", "BE"}),
        ("hessfn report --out r", {"runs"}),
        ("hessfn report m", {"my_problem.py"}),
        ("hessfn compare r", {"runs"}),
    ],
)
def test_bash_offers_what_may_come_next(
    words: str, offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    (tmp_path / "hessfn.bash").write_text(script("bash", capsys))
    (tmp_path / "my_problem.py").touch()
    (tmp_path / "runs").mkdir()
    done = subprocess.run(["bash", "-c", AT_TAB % words], cwd=tmp_path, capture_output=True, text=True)
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(word in text for word in ("num-probes", "compare")) and "SUPPRESS" not in text


def test_without_shtab_it_says_what_to_install(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    assert end.value.code == 2
    assert 'pip install "hessfn[completion]"' in capsys.readouterr().err
