"""What runs on the CPU runs on a device: `pytest -m gpu`, with HESSFN_TEST_DEVICE=second where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICE, needs_device, num_waits
from nets import dense_hessian, problem
from torch import Tensor, nn
from torch.nn import functional as F

import hessfn as hf
from hessfn.engine.fused import attention, cross_entropy, logits, tiles

pytestmark = [
    pytest.mark.gpu,
    needs_device,
]
cuda_only = pytest.mark.skipif(DEVICE != "cuda", reason="what CUDA alone has")
NETS = ["mlp", "conv", "attention", "lstm"]


def moved(x: Any) -> Any:
    return hf.tree.map(lambda t: t.to(DEVICE) if isinstance(t, Tensor) else t, x)


def there(net: str) -> tuple[Any, Any, Any, Tensor]:
    """A problem on the device, and its dense Hessian from the CPU."""
    loss, params, batch, model = problem(net)
    expected = dense_hessian(loss, params, batch)
    loss, _ = hf.functionalize(model.to(DEVICE), nn.CrossEntropyLoss())
    return loss, moved(params), moved(batch), expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("draw", [hf.rademacher, hf.gaussian])
def test_probes_are_the_same_bits_and_drawn_there(draw: Any, dtype: torch.dtype) -> None:
    like = {"w": torch.zeros(2100, 1007, dtype=dtype), "b": torch.zeros(5, dtype=dtype)}
    there, expected = draw(moved(like), 3, seed=4), draw(like, 3, seed=4)[2]
    found = there[2]  # the first draw may ask what the device can do
    assert all(torch.equal(expected[name], found[name].cpu()) and found[name].device.type == DEVICE for name in like)
    assert num_waits(lambda: there[1]) == 0


def test_vmap_over_seeds_draws_there() -> None:
    like = torch.zeros(70, device=DEVICE)
    together = torch.func.vmap(lambda seed: hf.gaussian(like, 1, seed=seed)[0])(torch.arange(3))
    assert torch.equal(together[2].cpu(), hf.gaussian(torch.zeros(70), 1, seed=2)[0])
    assert together.device.type == DEVICE


def _needs_its_kernels(net: str) -> None:
    if net == "lstm" and DEVICE == "second":
        pytest.skip("torch wants a kernel for the cells of every device but the CPU")


@pytest.mark.parametrize("mode", ["traced", "forward", "reverse", "double_backward", "linearized"])
@pytest.mark.parametrize("net", NETS)
def test_products_are_those_of_the_cpu(net: str, mode: Any) -> None:
    _needs_its_kernels(net)
    if (net, mode) == ("lstm", "forward"):
        pytest.skip("torch has no rule for it in forward mode there; a trace defines it")
    loss, params, batch, expected = there(net)
    made = {"linearized": lambda: hf.linearized_hvp(loss, params, batch)}
    matvec = made.get(mode, lambda: hf.hvp(loss, params, batch, mode=mode))()
    assert torch.allclose(hf.dense(matvec, params).cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("net", NETS)
def test_the_default_finds_a_trace_there(net: str) -> None:
    _needs_its_kernels(net)
    loss, params, batch, expected = there(net)
    assert hf.find_mode(loss, params, batch).mode == "traced"
    assert torch.allclose(hf.dense(hf.hvp(loss, params, batch), params).cpu(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_the_fisher_matrix_draws_its_targets_there(criterion: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = hf.gaussian(torch.zeros(40, 5).double(), 1)[0]
    y = torch.arange(40) % 3 if isinstance(criterion, nn.CrossEntropyLoss) else (x[:, :3] > 0).double()
    forward, params = hf.stateless(model)
    v = hf.gaussian(params, 1)[0]
    expected = hf.fvp(forward, criterion, params, (x, y), num_samples=4, seed=3)(v)
    there, v = hf.stateless(model.to(DEVICE))[0], moved(v)
    matvec = hf.fvp(there, criterion, moved(params), moved((x, y)), num_samples=4, seed=3)
    found = matvec(v)
    assert all(torch.allclose(found[name].cpu(), expected[name], rtol=1e-8, atol=1e-12) for name in expected)
    assert num_waits(lambda: matvec(v)) == 0


@cuda_only
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

    here, there = (
        all_of(matrix, start, signs),
        all_of(moved(matrix), list(map(moved, start)), list(map(moved, signs))),
    )
    for a, b in zip(hf.tree.leaves(here), hf.tree.leaves(there), strict=True):
        assert torch.allclose(a.double(), b.cpu().double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["linearized", "traced", "forward", "double_backward", "ggnvp", "fvp"])
@pytest.mark.parametrize("net", ["conv", "attention"])
def test_a_product_waits_for_nothing(net: str, kind: str) -> None:
    loss, params, batch, _ = there(net)
    forward, criterion = hf.stateless(problem(net)[3].to(DEVICE))[0], nn.CrossEntropyLoss()
    makes: dict[str, Any] = {
        "linearized": lambda: hf.linearized_hvp(loss, params, batch),
        "traced": lambda: hf.hvp(loss, params, batch, trace_after=0),
        "ggnvp": lambda: hf.ggnvp(forward, criterion, params, batch),
        "fvp": lambda: hf.fvp(forward, criterion, params, batch),
    }
    matvec = makes.get(kind, lambda: hf.hvp(loss, params, batch, mode=kind))()  # type: ignore[arg-type]
    v = hf.gaussian(params, 1)[0]
    for _ in range(3):  # the first are checked
        matvec(v)
    assert num_waits(lambda: matvec(v)) == 0


def mean_of_three(kind: str) -> tuple[Any, list[tuple[Tensor, Tensor]], Any]:
    loss, params, (x, y), _ = there("conv")
    forward, criterion = hf.stateless(problem("conv")[3].to(DEVICE))[0], nn.CrossEntropyLoss()
    batches = [(x[:4], y[:4]), (x[4:7], y[4:7]), (x[7:], torch.full_like(y[7:], -100))]  # the last weighs nothing
    makes: dict[str, Any] = {
        "mean_hvp": lambda: hf.mean_hvp(loss, params, batches),
        "linearized_hvp": lambda: hf.batch_mean(lambda b: hf.linearized_hvp(loss, params, b), batches, keep=True),
        "ggnvp": lambda: hf.batch_mean(lambda b: hf.ggnvp(forward, criterion, params, b), batches, keep=True),
    }
    return makes[kind](), batches, hf.gaussian(params, 1)[0]


@pytest.mark.parametrize("kind", ["mean_hvp", "linearized_hvp", "ggnvp"])
def test_a_product_with_a_mean_over_batches_waits_for_nothing(kind: str) -> None:
    matvec, _, v = mean_of_three(kind)
    first, *_ = [matvec(v) for _ in range(4)]  # these are checked
    assert num_waits(lambda: matvec(v)) == 0
    assert all(map(torch.allclose, hf.tree.leaves(matvec(v)), hf.tree.leaves(first)))


def test_data_that_change_give_an_error_at_first_and_no_number_later() -> None:
    matvec, batches, v = mean_of_three("mean_hvp")
    for _ in range(4):
        matvec(v)
    batches[0][0].mul_(2)
    assert all(leaf.isnan().all() for leaf in hf.tree.leaves(matvec(v)))
    with pytest.raises(ValueError, match="product 1 of the matvec is not finite"):
        hf.hutchinson(matvec, [v])
    matvec, batches, v = mean_of_three("mean_hvp")
    matvec(v)
    batches[0][0].mul_(2)
    with pytest.raises(ValueError, match="the batches of this pass are not those of the first one"):
        matvec(v)


FIXED_COST: dict[str, Any] = {
    "hutchinson": lambda matvec, z, m: hf.hutchinson(matvec, z[:m]),
    "hutchinson_diag": lambda matvec, z, m: hf.hutchinson_diag(matvec, z[:m]),
    "hutchpp": lambda matvec, z, m: hf.hutchpp(matvec, z[:m]),
    "xtrace": lambda matvec, z, m: hf.xtrace(matvec, z[:m]),
    "squared_frobenius": lambda matvec, z, m: hf.squared_frobenius(matvec, z[:m]),
    "hutchinson_per_leaf": lambda matvec, z, m: hf.hutchinson_per_leaf(matvec, z[:m]),
    "xdiag": lambda matvec, z, m: hf.xdiag(matvec, z[:m]),
    "squared_row_norms": lambda matvec, z, m: hf.squared_row_norms(matvec, z[:m]),
    "slq": lambda matvec, z, m: hf.slq(matvec, z[:2], m),
    "slq of many probes": lambda matvec, z, m: hf.slq(matvec, z[:m], 3),
    "slq orthogonal": lambda matvec, z, m: hf.slq(matvec, z[:2], m, orthogonalize=True),
    "slq orthogonal of many probes": lambda matvec, z, m: hf.slq(matvec, z[:m], 3, orthogonalize=True),
    "slq orthogonal in groups": lambda matvec, z, m: hf.slq(matvec, z[:m], 3, orthogonalize=True, batch_size=4),
    "lanczos": lambda matvec, z, m: hf.lanczos(matvec, z[0], m),
    "eigsh": lambda matvec, z, m: hf.eigsh(matvec, z[0], 2, rtol=None, max_matvecs=m),
    "power_iter": lambda matvec, z, m: hf.power_iter(matvec, z[0], max_matvecs=m, rtol=None),
    "solve": lambda matvec, z, m: hf.solve(matvec, z[0], damping=1.0, max_matvecs=m, rtol=None),
}


@pytest.mark.parametrize("name", FIXED_COST)
def test_routines_of_fixed_cost_wait_as_often_for_many_products_as_for_few(name: str) -> None:
    n = 60
    root = moved(hf.gaussian(torch.zeros(n, n).double(), 1)[0])
    matrix, z = root @ root.T, list(hf.rademacher(root[0], 24))
    run = FIXED_COST[name]
    few, many = (num_waits(lambda m=m: run(lambda v: matrix @ v, z, m)) for m in (8, 24))  # type: ignore[misc]
    assert few == many <= 16, "what is not finite is found at the end, and the end alone may wait"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_a_space_ends_a_random_direction_goes_on_there_as_on_the_cpu(dtype: torch.dtype) -> None:
    root = hf.gaussian(torch.zeros(40, 3).double(), 1)[0]
    matrix, start = (root @ root.T).to(dtype), hf.gaussian(torch.zeros(40, dtype=dtype), 1)[0]
    here, there = (
        hf.lanczos(lambda v, a=a: a @ v, v0, 12)  # type: ignore[misc]
        for a, v0 in ((matrix, start), (moved(matrix), moved(start)))
    )
    eps = torch.finfo(dtype).eps
    basis = there.basis.cpu()
    assert (here.beta < 20 * eps * here.alpha.abs().max()).sum() >= 8
    assert torch.allclose(basis @ basis.T, torch.eye(12, dtype=dtype), rtol=0, atol=300 * eps)
    for count, mine in ((12, there.alpha.cpu()), (4, there.beta.cpu())):
        expected = {12: here.alpha, 4: here.beta}[count]
        assert torch.allclose(mine[:count], expected[:count], rtol=1e-3, atol=300 * eps * float(here.alpha.max()))


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


@cuda_only
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


@cuda_only
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


def test_a_product_that_is_not_finite_is_no_rounding_error() -> None:
    ones = torch.ones(2, device=DEVICE)
    with pytest.raises(hf.HessfnError, match="not finite"):
        hf.rounding_of_products(lambda v: v, lambda v: v / 0, ones)


def test_a_mean_over_batches_takes_results_of_the_cpu() -> None:
    matrices = [torch.diag(torch.tensor([3.0, 1.0]) * c).to(DEVICE) for c in (1, 2)]
    values = hf.batches.mean(lambda a: hf.eigsh(lambda v: a @ v, torch.ones(2, device=DEVICE), 2).values, matrices)
    weights = torch.tensor([1.0, 3.0], device=DEVICE)
    sized = hf.batches.mean(
        lambda a: hf.eigsh(lambda v: a @ v, torch.ones(2, device=DEVICE), 2).values,
        matrices,
        weights=lambda a: weights[0 if a[0, 0] < 4 else 1],
    )
    assert torch.allclose(values().double(), torch.tensor([4.5, 1.5]).double(), rtol=1e-5)
    assert torch.allclose(sized().double(), torch.tensor([5.25, 1.75]).double(), rtol=1e-5)
