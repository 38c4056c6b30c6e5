"""``hessfn compare`` reads files that it did not write: one line for whatever is wrong, and nothing is obeyed."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import Parsed
from reports import changed, report_of, trained, truth, written

from hessfn.core.errors import InvalidInput
from hessfn.reporting import side
from hessfn.reporting.compare import compare, summary

REPORT = report_of(truth(trained()))
TEXT = json.dumps(REPORT)
HUGE = "9" * 5000

BYTES: dict[str, bytes] = {
    "empty": b"",
    "blank": b"  \n",
    "a brace": b"{",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "a text": b'"x"',
    "an empty object": b"{}",
    "cut off": TEXT.encode()[:-100],
    "two reports": (TEXT + TEXT).encode(),
    "not UTF-8": b'{"schema": "\xff\xfe"}',
    "UTF-16": TEXT.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "zero bytes": b"\0" * 100,
    "deep lists": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep inside": TEXT.replace('"loss": ', '"loss": ' + "[" * 100_000 + "]" * 100_000 + ', "x": ').encode(),
    "NaN": TEXT.replace('"loss": ', '"loss": NaN, "x": ').encode(),
    "infinite": TEXT.replace('"loss": ', '"loss": -Infinity, "x": ').encode(),
    "1e999": TEXT.replace('"loss": ', '"loss": 1e999, "x": ').encode(),
    "1e300": TEXT.replace('"loss": ', '"loss": 1e300, "x": ').encode(),
    "an integer of 5000 digits": TEXT.replace('"loss": ', f'"loss": {HUGE}, "x": ').encode(),
    "an integer of 4000 digits": TEXT.replace('"loss": ', f'"loss": {HUGE[:4000]}, "x": ').encode(),
    "a negative integer of 4000 digits": TEXT.replace('"seed": ', f'"seed": -{HUGE[:4000]}, "x": ').encode(),
    "schema 1": json.dumps({**REPORT, "schema": 1}).encode(),
    "schema 3": json.dumps({**REPORT, "schema": 3}).encode(),
    "schema true": json.dumps({**REPORT, "schema": True}).encode(),
    "schema of control characters": json.dumps({**REPORT, "schema": "\x1b[31m\n\r"}).encode(),
    "no schema": json.dumps({name: x for name, x in REPORT.items() if name != "schema"}).encode(),
}
WRONG: dict[str, dict[str, Any]] = {
    "a text for a list": {"eigenvalues": "many"},
    "a number for a list": {"eigenvalues": 3},
    "an object for a list": {"eigenvalues": {"0": 1.0}},
    "texts in a list": {"eigenvalues": ["1", "2", "3"]},
    "truth for a number": {"loss": True},
    "a list for a number": {"loss": [0.1]},
    "a list for an object": {"layers": []},
    "a number for a layer": {"layers": {"a": 3}},
    "a layer without entries": {"layers__0.bias__numel": None},
    "a layer of half an entry": {"layers__0.bias__numel": 1.5},
    "a layer of minus one": {"layers__0.bias__numel": -1},
    "a trace of text": {"trace__mean": "x"},
    "fewer residuals": {"residuals": [1.0]},
    "a short density": {"density__values": [1.0, 2.0]},
    "one point of a density": {"density": {"grid": [1.0], "values": [1.0], "lower": None, "upper": None}},
    "an empty density": {"density": {"grid": [], "values": [], "lower": None, "upper": None}},
    "settings that are a list": {"settings": [1]},
    "settings in settings": {"settings__seed": {"a": 1}},
    "numbers in a list of settings": {"settings__params": [1, 2]},
    "versions that are numbers": {"versions__torch": 2},
    "samples that are a text": {"samples": "x"},
    "samples of other layers' length": {"samples__layers__0.bias": [1.0]},
    "batches of another length": {"samples__batches__trace": [1.0]},
    "forms of another length": {"samples__batches__eigenvalues": [[1.0]]},
    "forms that are numbers": {"samples__batches__eigenvalues": [1.0]},
    "a model without a name": {"model": {}},
    "converged numbers": {"converged": [1, 0, 1]},
    "a cost of text": {"cost__seconds": "long"},
    "negative batches": {"data__num_batches": -1},
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return written(tmp_path / "good", REPORT)


def refused(good: Path, folder: Path | str) -> str:
    """The message, which is one line that a terminal can show."""
    page = good.parent / "page.html"
    with pytest.raises(InvalidInput) as caught:
        compare(good, folder, out=page)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    assert not page.exists()
    return message


@pytest.mark.parametrize("name", BYTES)
def test_bytes_that_are_no_report_are_one_line(name: str, good: Path, tmp_path: Path) -> None:
    folder = written(tmp_path / "bad", {})
    (folder / "report.json").write_bytes(BYTES[name])
    assert str(folder / "report.json") in refused(good, folder)


@pytest.mark.parametrize("name", WRONG)
def test_values_of_another_kind_are_named_by_their_place(name: str, good: Path, tmp_path: Path) -> None:
    message = refused(good, written(tmp_path / "bad", changed(REPORT, **WRONG[name])))
    place = next(iter(WRONG[name])).split("__")[0]
    assert place in message and "hessfn report PROBLEM --out" in message


@pytest.mark.parametrize("key", [name for name in REPORT if name not in ("schema", "landscape")])
def test_keys_that_are_missing_are_named_or_not_needed(key: str, good: Path, tmp_path: Path) -> None:
    less = {name: x for name, x in REPORT.items() if name != key}
    folder = written(tmp_path / "bad", less)
    if key in (
        "date",
        "loss",
        "loss_data_stderr",
        "accuracy",
        "gradient_norm",
        "rounding",
        "data_stderr",
        "sharpness",
        "activations",
        "samples",
    ):
        compare(good, folder, out=tmp_path / "page.html")
    else:
        assert f"it has no {key}" in refused(good, folder)


MADE: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda folder: folder.mkdir(),
    "no folder": lambda folder: None,
    "a file for a folder": lambda folder: folder.write_text("x"),
    "a folder for a file": lambda folder: (folder / "report.json").mkdir(parents=True),
    "a loop": lambda folder: (folder.mkdir(), (folder / "report.json").symlink_to("report.json")),
    "a loop of folders": lambda folder: folder.symlink_to(folder.name),
    "a pipe": lambda folder: (folder.mkdir(), os.mkfifo(folder / "report.json")),
    "a device without end": lambda folder: (folder.mkdir(), (folder / "report.json").symlink_to("/dev/zero")),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the files of POSIX")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", MADE)
def test_what_is_no_file_is_not_read(name: str, good: Path, tmp_path: Path) -> None:
    MADE[name](tmp_path / "bad")
    assert "report.json" in refused(good, tmp_path / "bad")


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0", "line\nbreak\x1b[31m", "\udcff"])
def test_names_of_folders_are_shown_and_not_obeyed(name: str, good: Path) -> None:
    refused(good, good.parent / name)


def test_a_file_beyond_the_limit_is_not_read(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = written(tmp_path / "bad", REPORT)
    monkeypatch.setattr(side, "_MOST_BYTES", len(TEXT) - 1)
    assert "larger than" in refused(good, bad)


def test_nothing_of_a_file_is_obeyed_by_page_or_terminal(good: Path, tmp_path: Path) -> None:
    """Escape sequences, characters that turn the direction of text, half characters, markup and names of any length."""
    evil = "\x1b[2J\x07\u202e\ud800</script><img src=x onerror=alert(1)>{{ 7 * 7 }}\r\n=1+1" + "x" * 10_000
    strings = {
        f"{path}": evil for path in ("settings__problem", "model__name", "model__mode", "date", "versions__torch")
    }
    layers = {evil: REPORT["layers"]["0.bias"], "__proto__": REPORT["layers"]["0.bias"]}
    bad = written(tmp_path / "bad", changed(REPORT, **strings, layers=layers, settings__params=[evil, evil]))
    result = compare(good, bad, out=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert not any(tag == "img" and attrs.get("src") == "x" for tag, attrs in Parsed(text).tags)
    lines = summary(result).splitlines()
    assert "".join(lines).isprintable() and max(map(len, lines)) <= 80
    assert "{{ 7 * 7 }}" in text


def mutated(x: Any, chance: random.Random) -> Any:
    """A report in which one value, anywhere, has become another one."""
    x = copy.deepcopy(x)
    inner = x
    while True:
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        if not keys:
            return x
        key = chance.choice(list(keys))
        if isinstance(inner[key], dict | list) and inner[key] and chance.random() < 0.85:
            inner = inner[key]
            continue
        wrong = [None, True, -1, 0, 10**30, 1e149, -1e149, 1e-320, "", "x\x1b", [], {}, [None], {"a": None}, [[]], 0.5]
        inner[key] = chance.choice(wrong)
        return x


@pytest.mark.slow
def test_reports_with_a_wrong_value_anywhere_are_one_line_or_a_page(good: Path, tmp_path: Path) -> None:
    chance, messages = random.Random(0), []
    bad = written(tmp_path / "bad", REPORT)
    for _ in range(50):
        (bad / "report.json").write_text(json.dumps(mutated(REPORT, chance)))
        try:
            result = compare(good, bad, out=tmp_path / "page.html")
        except InvalidInput as error:
            messages.append(str(error))
        else:
            lines = summary(result).splitlines()
            assert "".join(lines).isprintable() and max(map(len, lines)) <= 80
    assert 10 < len(messages) < 48
    assert all(message.isprintable() for message in messages)
