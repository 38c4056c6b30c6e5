"""The options of a report are one object: Python, the command line and report.json have the same names and defaults."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nets import classes, normal, seeded
from torch import nn

import hessfn as hf
from hessfn.reporting import cli
from hessfn.reporting.cli import main
from hessfn.reporting.options import DATA, WORK, Options

FIELDS = dataclasses.fields(Options)
QUICK: dict[str, Any] = {"k": 1, "num_probes": 2, "num_runs": 1, "num_steps": 3}
QUICK |= {"num_plane_points": 0, "num_activation_probes": 0}


def problem() -> tuple[Any, Any, Any]:
    return seeded(lambda: nn.Linear(3, 2)), nn.CrossEntropyLoss(), [(normal(5, 3), classes(5, 2))]


def test_the_keywords_of_report_are_the_options_with_their_defaults() -> None:
    keywords = {
        parameter.name: parameter.default
        for parameter in inspect.signature(hf.report).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    assert list(keywords.items()) == [(option.name, option.default) for option in FIELDS]
    assert all(option.metadata["help"] for option in FIELDS)
    described = hf.report.__doc__
    assert all(f"{option.name}: " in described or f"``{option.name}``" in described for option in FIELDS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": None}, "k=None must be an integer of at least 1"),
        ({"num_probes": 1}, "num_probes=1 must be at least 2"),
        ({"num_probes": 2.5}, "num_probes=2.5 must be an integer of at least 2"),
        ({"num_runs": 0}, "num_runs=0 must be at least 1"),
        ({"num_steps": 0}, "num_steps=0 must be at least 1"),
        ({"num_activation_probes": 1}, "num_activation_probes=1 must be at least 2, or 0 for none"),
        ({"num_plane_points": 2}, "num_plane_points=2 must be at least 3, or 0 for none"),
        ({"num_plane_points": -3}, "num_plane_points=-3 must be at least 3, or 0 for none"),
        ({"num_batches": 0}, "num_batches=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"rtol": 0.0}, "rtol=0.0 must be a positive and finite number"),
        ({"radius": -1.0}, "radius=-1.0 must be a positive and finite number"),
        ({"radius": float("inf")}, "radius=inf must be"),
        ({"radius": "far"}, "radius='far' must be"),
        ({"which": "XX"}, "which='XX' must be one of LM, LA, SA, BE"),
        ({"dtype": "int64"}, "dtype='int64' must be a floating-point type such as"),
        ({"dtype": "double64"}, "dtype='double64'"),
        ({"device": "gpu"}, "device='gpu' cannot be used here"),
        ({"resume": True, "journal": False}, "resume needs the journal"),
    ],
)
def test_what_is_out_of_range_is_said_with_its_range_before_anything_is_done(
    given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(hf.HessfnError, match=message):
        Options(**given)
    with pytest.raises(ValueError, match=message):
        hf.report(problem(), tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_what_depends_on_the_model_is_checked_once_it_is_known() -> None:
    assert Options(num_steps=60).fitted(8).num_steps == 8
    assert Options(num_steps=6).fitted(8).num_steps == 6
    with pytest.raises(ValueError, match="k=9 must be between 1 and 8, the number of parameters"):
        Options(k=9).fitted(8)


def test_an_option_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TypeError, match="probes"):
        hf.report(problem(), tmp_path, probes=5)
    with pytest.raises(SystemExit, match="2"):
        main(["report", "--probes=5"])
    assert "unrecognized arguments: --probes=5" in capsys.readouterr().err


def test_options_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().k = 3  # type: ignore[misc]


@pytest.mark.slow
def test_numbers_of_numpy_and_an_iterator_of_patterns_will_do(tmp_path: Path) -> None:
    given = {**QUICK, "k": np.int64(2), "rtol": np.float32(0.5), "params": (name for name in ["weight", "bias"])}
    result = hf.report(problem(), tmp_path, **given)
    assert list(result["layers"]) == ["weight", "bias"]
    found = json.loads((tmp_path / "report.json").read_text())["settings"]
    assert (found["k"], found["rtol"], found["params"]) == (2, 0.5, ["weight", "bias"])


@pytest.mark.slow
def test_report_json_has_all_that_the_numbers_depend_on(tmp_path: Path) -> None:
    settings = hf.report(problem(), tmp_path, name="mine", **QUICK)["settings"]
    for option in FIELDS:
        assert (option.metadata["group"] in (DATA, WORK)) == (option.name in settings) or option.name == "command"
    assert {name: settings[name] for name in QUICK} == QUICK
    assert (settings["problem"], settings["num_parameters"], settings["num_samples"]) == ("mine", 8, 5)
    assert (settings["dtype"], settings["device"]) == ("float64", "cpu")
    chosen = hf.report(problem(), tmp_path, params=lambda name, p: name == "bias", **QUICK)["settings"]
    assert "lambda" in chosen["params"]


@pytest.fixture
def given_to_run(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options that the command line hands on; nothing is computed."""
    found: list[Options] = []

    def run(problem: Any, out: Path, options: Options) -> None:
        found.append(options)
        raise OSError("far enough")

    monkeypatch.setattr("hessfn.reporting.run.run", run)
    monkeypatch.setattr("hessfn.reporting.loading.load_problem", lambda spec, arguments: problem())
    return found


def test_the_command_line_has_the_same_defaults(given_to_run: list[Options]) -> None:
    assert main(["report", "a:b"]) == 2
    assert given_to_run == [Options(name="a:b", command="hessfn report a:b")]


VALUES = {
    "params": ("fc.*", ("fc.*",)),
    "dtype": ("float64", "float64"),
    "device": ("cpu", "cpu"),
    "which": ("SA", "SA"),
    "rtol": ("1e-5", 1e-5),
    "radius": ("0.5", 0.5),
}


@pytest.mark.parametrize("option", [option for option in FIELDS if option.metadata["group"]], ids=lambda o: o.name)
def test_every_option_can_be_given_on_the_command_line(option: Any, given_to_run: list[Options]) -> None:
    flag, (text, value) = f"--{option.name.replace('_', '-')}", VALUES.get(option.name, ("7", 7))
    words = [flag if len(option.name) > 1 else f"-{option.name}", text]
    if isinstance(option.default, bool):
        words, value = [f"--no-{option.name}" if option.default else flag], not option.default
    assert main(["report", "a:b", *words]) == 2
    plain = Options(name="a:b", command=given_to_run[0].command)
    assert given_to_run == [dataclasses.replace(plain, **{option.name: value})]


def test_the_help_says_what_each_is_by_default() -> None:
    parser = next(x for x in cli.command_parser()._actions if isinstance(x, argparse._SubParsersAction)).choices[
        "report"
    ]
    texts = {action.dest: action.help for action in parser._actions}
    for option in FIELDS:
        if option.metadata["group"] and not isinstance(option.default, bool):
            default = "" if option.default in (None, "*") else f" {option.default})"
            assert f"(default:{default}" in texts[option.name]
