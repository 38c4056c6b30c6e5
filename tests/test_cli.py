from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hessfn.reporting import run
from hessfn.reporting.cli import command_parser, main
from hessfn.reporting.loading import load_problem
from hessfn.reporting.options import Options

PROBLEM = """
import torch
from neighbour import features

def small(scale=1.0, name="x"):
    batch = torch.linspace(-1, 1, 4 * features).reshape(4, features), torch.tensor([0, 1, 1, 0])
    model = torch.nn.Sequential(torch.nn.Linear(features, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2)).double()
    for i, p in enumerate(model.parameters()):
        torch.nn.init.constant_(p, scale * (0.3 - 0.1 * i))
    return model, torch.nn.CrossEntropyLoss(), [(batch[0].double(), batch[1])]

def interrupted():
    raise KeyboardInterrupt

def failing():
    raise OSError("no such net:\\nsecond line")

def wrong():
    return 3

not_a_function = 3

def leaves():
    raise SystemExit(3)

def unheard():
    raise KeyError("of")
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour.py").write_text("features = 3\n")
    (tmp_path / "my-problem.py").write_text(PROBLEM)
    monkeypatch.delitem(sys.modules, "neighbour", raising=False)
    return tmp_path / "my-problem.py"


QUICK = ["--num-probes", "3", "--num-runs", "1", "--num-steps", "4", "-k", "2", "--num-activation-probes", "0"]


@pytest.mark.slow
def test_report_writes_and_says_where(file: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["report", f"{file}:small", "--out", str(tmp_path / "out"), "--set", "scale=0.5", "--set", "name=a=b"]
    assert main([*arguments, "--params", "0.*", "--params", "2.bias", "--dtype", "float64", *QUICK]) == 0
    printed = capsys.readouterr()
    assert str(tmp_path / "out" / "report.html") in printed.out
    assert "100%" in printed.err
    assert "product" in printed.err
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(result["layers"]) == ["0.weight", "0.bias", "2.bias"]
    assert len(result["eigenvalues"]) == 2
    assert result["settings"]["problem"] == f"{file}:small"


def test_settings_are_python_values_or_text(file: Path) -> None:
    model, _, _ = load_problem(f"{file}:small", {"scale": 2.0})
    assert model[0].weight[0, 0].item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_module:function"], "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (["no_such_file.py:function"], "there is no file 'no_such_file.py'"),
        (["no_colon"], "must be module:function or path/to/file.py:function"),
        (["FILE:absent"], "there is no function 'absent'"),
        (["FILE:not_a_function"], "there is no function 'not_a_function'"),
        (["FILE:failing"], "failed: OSError: no such net: second line (FILE:16)"),
        (["FILE:wrong"], "a problem is (model, criterion, batches), not int"),
        (["FILE:small", "--set", "nothing=1"], "unexpected keyword argument 'nothing'"),
        (["FILE:small", "--params", "conv*"], "no parameter matches"),
        (["FILE:small", "-k", "100"], "k=100 must be between 1 and 14"),
        (["FILE:small", "--device", "gpu"], "device='gpu'"),
        (["FILE:small", "--dtype", "float63"], "dtype='float63'"),
        (["FILE:small", "--dtype", "float8_e5m2"], "dtype='float8_e5m2' must be a floating-point type such as"),
        (["FILE:small", "--device", "meta"], "device='meta' cannot be used here"),
        (["FILE:small", "--rtol", "-1"], "rtol=-1.0 must be a positive and finite number"),
        (["FILE:small", "--rtol", "-1e-3"], "rtol=-0.001 must be a positive and finite number"),
        (["FILE:small", "--rtol", "-inf"], "rtol=-inf must be a positive and finite number"),
        (["FILE:small", "-k", "-1"], "k=-1 must be at least 1"),
        (["FILE:small", "--num-probes", str(10**30)], "must be at most"),
        (["FILE:small", "--num-batches", "2"], "num_batches=2 must be at most 1, the number of batches there are"),
        (["FILE:small", "--resume"], "there is nothing to resume in"),
        (["FILE:small", "--out", "FILE/below"], "cannot be written to"),
        (["FILE:small", "--out", "a" * 300], "(File name too long)"),
        (["FILE:small", "--out", "a/" * 3000], "(File name too long)"),
        (["FILE:small", "--out", "/dev/null"], "cannot be written to '/dev/null'"),
        (["FILE:small\x1b[2J"], r"there is no function 'small\x1b[2J'"),
        (["FILE:leaves"], "failed: SystemExit: 3"),
        (["FILE:unheard"], "failed: KeyError: 'of'"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*.*"))
    given = [argument.replace("FILE", str(file)) for argument in arguments]
    assert main(["report", "--out", str(tmp_path / "out"), *given]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hessfn: error: ")
    assert printed.err.count("\n") == 1
    assert message.replace("FILE", str(file)) in printed.err
    assert [path for path in sorted(tmp_path.rglob("*.*")) if "__pycache__" not in str(path)] == before


def test_an_error_can_be_traced(file: Path, capsys: Any) -> None:
    assert main(["report", f"{file}:failing", "--traceback"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


NOT_UNDERSTOOD = [
    [],
    ["report", "--set", "novalue"],
    ["report", "-k", "many"],
    ["report", "--out", ""],
    ["report", "--out", "a\0b"],
    ["report", "--timeout", "-5"],
    ["report", "--timeout", "1e300"],
    ["report", "--rtol", "-x"],
    ["report", "--no-such-option\x1b[2J\n\udcff"],
    ["compare", "one"],
    ["compare", "", "two"],
    ["compare", "one", "two", "--out", ""],
]


@pytest.mark.parametrize("arguments", NOT_UNDERSTOOD)
def test_arguments_that_cannot_be_understood_are_one_line_and_exit_code_2(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("hessfn: error: ")
    assert line.isprintable()


def test_an_interrupt_exits_with_130_and_one_line(file: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["report", f"{file}:interrupted", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.strip() == "hessfn: interrupted, no report was written"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "problem"),
    [("jinja2", "FILE:small"), ("sklearn.datasets", "hessfn.problems:digits")],
)
def test_a_missing_extra_is_named(module: str, problem: str, file: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["report", problem.replace("FILE", str(file))]) == 2
    assert 'pip install "hessfn[demo]"' in capsys.readouterr().err


def test_help_fits_a_terminal_and_shows_examples_and_defaults(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main(["report", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "examples:",
        "how much to compute",
        f"(default: {Options.num_probes})",
        "cifar10_resnet20",
        "PROBLEM is code",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_python_dash_m_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "hessfn", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("hessfn 0.")


def test_the_default_problem_end_to_end(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    arguments = ["--set", "num_images=60", "--set", "epochs=2", "--num-probes", "3", "--num-runs", "1"]
    arguments += ["--num-steps", "8", "--num-activation-probes", "2"]
    assert main(["report", "--out", str(tmp_path), *arguments]) == 0
    result = json.loads((tmp_path / "report.json").read_text())
    assert all(result["converged"])
    assert result["settings"]["num_samples"] == 60
    assert sum(layer["numel"] for layer in result["layers"].values()) == result["settings"]["num_parameters"]


HOSTILE = [
    "", " ", "-1", "-1e-3", "0", "1.5", "nan", "-inf", "1e999", "9" * 5000, str(10**30), "a" * 300, "a/" * 3000, "None",
    "[" * 9999, "*", "\x1b[2J\r\n", "\u202e", "\udcff", "a\0b", "x=", "x=\udcff", "name='\x1b'", "float8_e4m3fn",
    "meta", "cuda:99", "/dev/null", "/proc/self/mem", ".", "..", "%s", "{}", "--", "-", "LM",
]  # fmt: skip


def flags() -> list[str]:
    """Every option of ``hessfn report`` that takes a value, and its two places."""
    (commands,) = [action for action in command_parser()._actions if isinstance(action.choices, dict)]
    assert isinstance(commands.choices, dict)
    return [action.option_strings[-1] for action in commands.choices["report"]._actions if action.option_strings]


@pytest.mark.slow
@pytest.mark.parametrize("flag", [*flags(), "PROBLEM", "FUNCTION"])
def test_no_argument_leads_to_a_traceback(flag: str, file: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def stop(*_: Any) -> None:
        raise RuntimeError("all arguments are good")

    monkeypatch.setattr(run, "analyse", stop)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for value in HOSTILE:
        problem = {"PROBLEM": value, "FUNCTION": f"{file}:{value}"}.get(flag, f"{file}:small")
        given = [] if flag in ("PROBLEM", "FUNCTION") else [flag, value]
        try:
            code = main(["report", problem, *given])
        except SystemExit as exit_:  # from argparse; 0 is of --help
            code = exit_.code
        printed = capsys.readouterr()
        assert code == 2 or flag == "--help", value
        lines = [line for line in printed.err.splitlines() if line.startswith("hessfn: error: ")]
        assert len(lines) == (code == 2), value
        assert all(line.isprintable() for line in lines), value
        assert "Traceback" not in printed.err or flag == "--traceback", value
    assert [path.name for path in tmp_path.rglob(".*")] == []
