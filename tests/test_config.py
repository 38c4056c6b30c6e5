"""What computes here is said in words that a report of a bug can hold."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch

import hessfn as hf
from hessfn.core import config
from hessfn.engine import pipeline


def test_all_that_decides_the_last_bits_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    hf.show_config()
    shown = dict(
        line.split(maxsplit=1)
        for line in capsys.readouterr().out.splitlines()
        if "kernel" not in line and "compiler" not in line
    )
    assert shown["hessfn"] == hf.__version__
    assert shown["torch"] == torch.__version__
    assert shown["threads"] == str(torch.get_num_threads())
    assert platform.machine() in shown["processor"]


@pytest.mark.skipif(pipeline.lower_to_kernel is None, reason="the kernel is not there")
def test_the_kernel_is_shown_or_why_there_is_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HESSFN_NATIVE", "0")
    hf.show_config()
    shown = dict(re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines())
    assert shown["conv3x3 kernel"] == shown["flash attention kernel"] == "off (HESSFN_NATIVE=0)"


def test_kernels_announce_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "KERNELS", {})
    assert not [name for name in config.config() if "kernel" in name]
    assert list(config.numerics()) == ["threads"]
    config.announce_kernel("fft", lambda: {"kernel": "0123", "compiler": "gcc 12"})
    assert config.config()["fft compiler"] == "gcc 12"
    assert config.numerics() == {"threads": str(torch.get_num_threads()), "fft kernel": "0123"}
    assert all(isinstance(value, str) for value in config.config().values())


CPUINFO = """processor\t: 0
model name\t: Abacus
cpu MHz\t\t: {clock}
flags\t\t: {flags}

processor\t: 1
model name\t: another
"""


def test_processors_differ_by_model_and_features_not_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def processor(clock: int, flags: str) -> dict[str, str]:
        (tmp_path / "cpuinfo").write_text(CPUINFO.format(clock=clock, flags=flags))
        return config.processor.__wrapped__()

    monkeypatch.setattr(config, "_CPUINFO", tmp_path / "cpuinfo")
    first = processor(2000, "beads wires")
    assert first == {"machine": platform.machine(), "model name": "Abacus", "flags": "beads wires"}
    assert processor(3000, "beads wires") == first
    assert processor(2000, "beads") != first
    monkeypatch.setattr(config, "_CPUINFO", tmp_path / "missing")
    assert config.processor.__wrapped__()["machine"] == platform.machine()
