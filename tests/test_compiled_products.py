"""``torch.compile`` takes a linearized product as one graph: of a residual net, of a GPT, of an MLP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree


def mlp() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    return net, (torch.randn(20, 6), torch.arange(20) % 3)


def resnet18() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    models = pytest.importorskip("torchvision.models")
    return models.resnet18(num_classes=10), (torch.randn(2, 3, 32, 32), torch.tensor([1, 2]))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(16, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1],) * 2, float("-inf"), dtype=self.token.weight.dtype).triu(1)
        return self.head(self.block(self.token(ids), mask)).flatten(0, 1)


def gpt() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    ids = torch.randint(16, (2, 9))
    return GPT(), (ids[:, :-1].contiguous(), ids[:, 1:].flatten())


def linearized(build: Callable[[], Any], dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net, (x, y) = build()
    loss, params = hf.functionalize(net.to(dtype).eval(), nn.CrossEntropyLoss())
    batch = (x.to(dtype) if x.is_floating_point() else x, y)
    return hf.linearized_hvp(loss, params, batch, check=False), hf.gaussian(params, 2)


def off(found: Any, expected: Any) -> float:
    return float(tree.norm(tree.add(found, expected, -1.0)) / tree.norm(expected))


@pytest.mark.parametrize("build", [mlp, *(pytest.param(net, marks=pytest.mark.slow) for net in (gpt, resnet18))])
def test_a_product_that_was_never_called_is_one_graph(build: Callable[[], Any]) -> None:
    matvec, (v, w) = linearized(build)
    compiled = torch.compile(matvec, fullgraph=True, backend="aot_eager")
    assert off(compiled(v), matvec(v)) < 1e-12 and off(compiled(w), matvec(w)) < 1e-12


@pytest.mark.slow
def test_torch_s_own_compiler_gives_the_same_product() -> None:
    # In a process of its own: a compiler leaves threads and processes behind.
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.path.insert(0, sys.argv[1]);"
        "import torch; from test_compiled_products import linearized, mlp, off;"
        "matvec, (v, w) = linearized(mlp, torch.float32);"
        "compiled = torch.compile(matvec, fullgraph=True, mode='reduce-overhead');"
        "print(max(off(compiled(x), matvec(x)) for x in (v, w)))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "compiler" in done.stderr and "InvalidCxxCompiler" in done.stderr:
        pytest.skip("no C++ compiler")
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 1e-5
