"""What runs on the CPU runs on a CUDA device: `pytest -m gpu` where there is one, skipped elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nets import dense_hessian, problem
from torch import Tensor, nn
from torch.nn import functional as F

import hessfn as hf
from hessfn.engine.fused import attention, cross_entropy, logits, tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NETS = ["mlp", "conv", "attention", "lstm"]


def on_gpu(x: Any) -> Any:
    return hf.tree.map(lambda t: t.cuda() if isinstance(t, Tensor) else t, x)


def there(net: str) -> tuple[Any, Any, Any, Tensor]:
    """A problem on the device, and its dense Hessian from the CPU."""
    loss, params, batch, model = problem(net)
    expected = dense_hessian(loss, params, batch)
    moved, _ = hf.functionalize(model.cuda(), nn.CrossEntropyLoss())
    return moved, on_gpu(params), on_gpu(batch), expected


@pytest.fixture
def without_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("draw", [hf.rademacher, hf.gaussian])
def test_probes_are_the_same_bits_and_drawn_there(draw: Any, dtype: torch.dtype, request: Any) -> None:
    like = {"w": torch.zeros(2100, 1007, dtype=dtype), "b": torch.zeros(5, dtype=dtype)}
    moved, expected = draw(on_gpu(like), 3, seed=4), draw(like, 3, seed=4)[2]
    request.getfixturevalue("without_synchronisation")
    found = moved[2]
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(expected[name], found[name].cpu()) and found[name].is_cuda for name in like)


def test_vmap_over_seeds_draws_there() -> None:
    like = torch.zeros(70, device="cuda")
    together = torch.func.vmap(lambda seed: hf.gaussian(like, 1, seed=seed)[0])(torch.arange(3))
    assert torch.equal(together[2].cpu(), hf.gaussian(torch.zeros(70), 1, seed=2)[0]) and together.is_cuda


@pytest.mark.parametrize("mode", ["traced", "forward", "reverse", "double_backward", "linearized"])
@pytest.mark.parametrize("net", NETS)
def test_products_are_those_of_the_cpu(net: str, mode: Any) -> None:
    if (net, mode) == ("lstm", "forward"):
        pytest.skip("torch has no rule for it in forward mode there; a trace defines it")
    loss, params, batch, expected = there(net)
    made = {"linearized": lambda: hf.linearized_hvp(loss, params, batch)}
    matvec = made.get(mode, lambda: hf.hvp(loss, params, batch, mode=mode))()
    assert torch.allclose(hf.dense(matvec, params).cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_the_default_finds_a_trace_there(net: str) -> None:
    loss, params, batch, expected = there(net)
    assert hf.find_mode(loss, params, batch).mode == "traced"
    assert torch.allclose(hf.dense(hf.hvp(loss, params, batch), params).cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_the_fisher_matrix_draws_its_targets_there(criterion: Any, request: pytest.FixtureRequest) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = hf.gaussian(torch.zeros(40, 5).double(), 1)[0]
    y = torch.arange(40) % 3 if isinstance(criterion, nn.CrossEntropyLoss) else (x[:, :3] > 0).double()
    forward, params = hf.stateless(model)
    v = hf.gaussian(params, 1)[0]
    expected = hf.fvp(forward, criterion, params, (x, y), num_samples=4, seed=3)(v)
    moved, v = hf.stateless(model.cuda())[0], on_gpu(v)
    matvec = hf.fvp(moved, criterion, on_gpu(params), on_gpu((x, y)), num_samples=4, seed=3)
    matvec(v)
    request.getfixturevalue("without_synchronisation")
    found = matvec(v)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.allclose(found[name].cpu(), expected[name], rtol=1e-8, atol=1e-12) for name in expected)


@pytest.mark.parametrize("net", NETS)
def test_a_linearized_product_is_a_cuda_graph(net: str) -> None:
    loss, params, batch, expected = there(net)
    matvec = hf.linearized_hvp(loss, params, batch)
    replay = torch.cuda.make_graphed_callables(matvec, (hf.gaussian(params, 1)[0],))
    columns = hf.dense(lambda v: hf.tree.map(torch.clone, replay(v)), params)
    assert torch.allclose(columns.cpu(), expected, rtol=1e-8, atol=1e-10)


def test_every_consumer_gives_what_it_gives_on_the_cpu() -> None:
    n = 60
    basis = torch.linalg.qr(hf.gaussian(torch.zeros(n, n).double(), 1)[0])[0]
    matrix = basis @ torch.diag(torch.linspace(-1, 4, n).double() ** 3) @ basis.T
    start, signs = hf.gaussian(torch.zeros(n).double(), 4), hf.rademacher(torch.zeros(n).double(), 12)

    def all_of(a: Tensor, v: Any, z: Any) -> list[Any]:
        matvec = lambda x: a @ x  # noqa: E731
        pairs = hf.eigsh(matvec, v[0], 4, second_start=v[1], keep_all=True)
        known: Any = {"eigenpairs": pairs}
        return [
            pairs._replace(vectors=None), hf.power_iter(matvec, v[0])._replace(vector=None),
            hf.hutchinson(matvec, z), hf.hutchinson(matvec, z, **known), hf.hutchinson_diag(matvec, z, **known),
            hf.hutchpp(matvec, z), hf.xtrace(matvec, z), hf.xdiag(matvec, z), hf.slq(matvec, v[2:], 12, **known),
            hf.density(hf.slq(matvec, v[2:], 12)), hf.squared_frobenius(matvec, z, **known),
            hf.squared_row_norms(matvec, z, **known), hf.solve(matvec, v[3], damping=3.0), hf.dense(matvec, v[0]),
        ]  # fmt: skip

    here, moved = (
        all_of(matrix, start, signs),
        all_of(matrix.cuda(), list(map(on_gpu, start)), list(map(on_gpu, signs))),
    )
    for a, b in zip(hf.tree.leaves(here), hf.tree.leaves(moved), strict=True):
        assert torch.allclose(a.double(), b.cpu().double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("which", ["linearized", "traced"])
def test_a_product_waits_for_nothing(which: str, request: pytest.FixtureRequest) -> None:
    loss, params, batch, _ = there("conv")
    options: Any = {"trace_after": 0}
    matvec = hf.linearized_hvp(loss, params, batch) if which == "linearized" else hf.hvp(loss, params, batch, **options)
    v = hf.gaussian(params, 1)[0]
    for _ in range(2):
        matvec(v)
    request.getfixturevalue("without_synchronisation")
    matvec(v)


def test_routines_of_fixed_cost_wait_for_nothing(request: pytest.FixtureRequest) -> None:
    n = 60
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).cuda()
    matrix = root @ root.T

    def matvec(v: Tensor) -> Tensor:
        return matrix @ v

    signs = list(hf.rademacher(torch.zeros(n).cuda(), 4))
    request.getfixturevalue("without_synchronisation")
    hf.hutchinson(matvec, signs)
    hf.hutchinson_diag(matvec, signs)


@pytest.fixture
def in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, cross_entropy):
        monkeypatch.setattr(module, "WORTH", 1)
    monkeypatch.setattr(tiles, "COLUMNS", 3)
    monkeypatch.setattr(tiles, "ENTRIES", 40)
    monkeypatch.setattr(logits, "ENTRIES", 15)


@pytest.mark.parametrize("net", ["attention", "mlp"])
def test_fused_operations_too(in_small: None, net: str) -> None:
    loss, params, batch, expected = there(net)
    for matvec in (hf.hvp(loss, params, batch, trace_after=0), hf.linearized_hvp(loss, params, batch)):
        assert torch.allclose(hf.dense(matvec, params).cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tf32", [False, True])
def test_the_rounding_of_float32_and_of_tf32_is_found_out(tf32: bool) -> None:
    net = nn.Sequential(nn.Linear(512, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).cuda()
    y = torch.arange(256).cuda() % 10
    loss, params = hf.functionalize(net, nn.CrossEntropyLoss())
    wide_loss, wide = hf.functionalize(net.double(), nn.CrossEntropyLoss())
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        narrow = hf.hvp(loss, params, (x, y))
        exact = hf.hvp(wide_loss, wide, (x.double(), y))
        pairs = hf.eigsh(narrow, hf.gaussian(params, 1)[0], 3, rtol=1e-2, max_matvecs=80)
        rounding = hf.rounding_of_pairs(narrow, exact, pairs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    truth = hf.eigsh(exact, hf.gaussian(wide, 1)[0], 8, rtol=1e-6)
    apart = (pairs.values.cpu()[:, None] - truth.values.cpu()).abs().amin(1)  # a residual says that one is near
    assert (apart <= (pairs.residuals + rounding).cpu()).all()
    assert (float((rounding / pairs.values.abs()).max()) > 1e-5) is tf32


def test_a_long_sequence_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8192 tokens: one matrix of scores of 8 heads would be 2.1 GB in float32, and a product has several.
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (8, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    net, x = Layer().cuda(), torch.randn(1, 8192, 64).cuda()
    loss, params = hf.functionalize(net, nn.MSELoss())
    matvec, v = hf.hvp(loss, params, (x, torch.zeros_like(x)), check=False, trace_after=0), hf.gaussian(params, 1)[0]
    torch.cuda.reset_peak_memory_stats()
    matvec(v)
    assert torch.cuda.max_memory_allocated() < 1e9
