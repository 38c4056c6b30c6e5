"""Stated errors cover what float32, TF32 and bfloat16 do to products, and are not far too wide."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import CRITERIA, NETS, classes, dense_hessian, normal, seeded
from spectra import on, symmetric
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import hessfn as hf
from hessfn.core import tree

WHICH = ["mlp", "conv", "batch_norm", "group_norm", "layer_norm", "rms_norm"]
MULTIPLY = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}


def ten_bits(x: Any) -> Any:
    """As TF32 takes its factors: ten bits after the point, to nearest."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] in MULTIPLY:
            args = tree.map(ten_bits, args)
        return func(*args, **(kwargs or {}))


def plain_product(loss: Any, params: dict[str, Tensor], batch: Any) -> Any:
    """Double backward of torch's own, which a dispatch mode sees."""

    def matvec(v: dict[str, Tensor]) -> dict[str, Tensor]:
        live = {name: x.detach().clone().requires_grad_() for name, x in params.items()}
        leaves = list(live.values())
        first = torch.autograd.grad(loss(live, batch), leaves, create_graph=True)
        second = torch.autograd.grad(first, leaves, [v[name] for name in live], materialize_grads=True)
        return {name: x.detach() for name, x in zip(live, second, strict=True)}

    return matvec


def under_tf32(matvec: Any) -> Any:
    def product(v: Any) -> Any:
        with TF32():
            return matvec(v)

    return product


def converted(batch: Any, dtype: torch.dtype) -> Any:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


def case(net: str, arithmetic: str, seed: int) -> tuple[Any, Any, Tensor]:
    """Products in an arithmetic, parameters, and the dense Hessian of the same function in float64."""
    build, shape = NETS[net]
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    coarse = seeded(build, seed).to(dtype)
    fine = copy.deepcopy(coarse).double()
    criterion, targets = CRITERIA["cross_entropy"]
    batch = converted((normal(*shape, seed=seed + 1), targets(shape[0])), dtype)
    loss, params = hf.functionalize(coarse, criterion)
    truth = dense_hessian(*hf.functionalize(fine, criterion), converted(batch, torch.float64))
    matvec = plain_product(loss, params, batch)
    return under_tf32(matvec) if arithmetic == "TF32" else matvec, params, truth


def flat(x: Any) -> Tensor:
    return tree.ravel(x)[0].double()


def pairs_of(matvec: Any, params: Any, k: int, rtol: float) -> hf.EigenPairs:
    return hf.eigsh(matvec, hf.gaussian(params, 1)[0], k=k, rtol=rtol, max_matvecs=40)


@pytest.mark.parametrize(
    ("arithmetic", "rtol"), [("float32", 1e-6), pytest.param("TF32", 1e-3, marks=pytest.mark.slow), ("bfloat16", 1e-2)]
)
def test_residual_and_rounding_cover_the_true_residual(arithmetic: str, rtol: float) -> None:
    covered, before, ratios = [], [], []
    for net in WHICH:
        for seed in range(4):
            matvec, params, truth = case(net, arithmetic, seed)
            found = pairs_of(matvec, params, 4, rtol)
            rounding = hf.rounding_of_pairs(matvec, on(truth, None), found)
            for i in range(4):
                q = tree.map(lambda x, i=i: x[i], found.vectors)
                exact = truth @ flat(q)
                true = (exact - found.values[i] * flat(q)).norm() / flat(q).norm()
                covered.append(bool(true <= found.residuals[i] + rounding[i]))
                before.append(bool(true <= found.residuals[i]))
                ratios.append(float(rounding[i] / (exact - flat(matvec(q))).norm()))
    assert sum(covered) >= 0.95 * len(covered)
    assert sum(before) < 0.9 * len(before)  # or there would be nothing to cover
    assert sorted(ratios)[len(ratios) // 2] <= 5


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", ["even", "decaying", "one"])
def test_a_plain_matrix_is_covered_too(spectrum: str) -> None:
    """There the error of every pair is of one size, however small its eigenvalue."""
    values = {
        "even": torch.linspace(1, 2, 60),
        "decaying": 50 * 0.8 ** torch.arange(60),
        "one": torch.tensor([100.0, *[1.0] * 59]),
    }[spectrum].double()
    missed = 0
    for seed in range(50):
        exact = symmetric(values, seed)
        error = symmetric(torch.linspace(-1, 1, 60), seed + 100) * 1e-3
        found = hf.eigsh(on(exact - error, None), normal(60, seed=seed), k=8, rtol=1e-8)
        rounding = hf.rounding_of_pairs(on(exact - error, None), on(exact, None), found)
        true = (exact @ found.vectors.T - found.vectors.T * found.values).norm(dim=0)
        missed += int((true > found.residuals + rounding).sum())
    assert missed <= 0.05 * 50 * 8


def test_of_one_pair_it_is_twice_the_error_of_its_product() -> None:
    exact, error = symmetric(torch.linspace(1, 5, 20)), 1e-3 * symmetric(torch.linspace(-1, 1, 20), 1)
    found = hf.eigsh(on(exact - error, None), normal(20), k=1, rtol=1e-10)
    rounding = hf.rounding_of_pairs(on(exact - error, None), on(exact, None), found)
    assert torch.allclose(rounding, 2 * (error @ found.vectors[0]).norm(), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["float32", "TF32", "bfloat16"])
def test_what_rounding_does_to_traces_is_covered(arithmetic: str) -> None:
    covered, ratios = [], []
    for net in WHICH:
        for seed in range(3):
            matvec, params, truth = case(net, arithmetic, seed)
            exact = on(truth, None)
            first, *probes = hf.rademacher(params, 25, seed=seed)
            found = hf.rounding_of_products(matvec, exact, first)
            errors: dict[str, Tensor] = {}
            for z in probes:
                wide = tree.map(Tensor.double, z)
                product, image = matvec(z), exact(wide)
                for name in params:
                    e = (wide[name] * (image[name] - product[name].double())).sum()
                    errors[name] = errors.get(name, 0) + e / len(probes)
            total = sum(errors.values())
            for true, stated in [(total, found.total), *[(errors[name], found.leaves[name]) for name in params]]:
                covered.append(bool(abs(true) <= stated))
                ratios.append(float(stated / abs(true).clamp(min=1e-300)))
    assert sum(covered) >= 0.95 * len(covered)
    assert sorted(ratios)[len(ratios) // 2] <= 30  # most of an error that averages out is noise, of 1 / 5 here


def test_a_bias_of_the_trace_is_covered() -> None:
    """Rounding down moves every eigenvalue the same way: it does not average out over leaves."""
    missed = 0
    like = {"a": torch.zeros(30).double(), "b": torch.zeros(30).double()}
    for seed in range(100):
        exact, bias = symmetric(torch.linspace(0, 5, 60), seed), 1e-3 * symmetric(torch.linspace(0, 1, 60), seed + 500)
        found = hf.rounding_of_products(on(exact - bias, like), on(exact, like), hf.rademacher(like, 1, seed=seed)[0])
        blocks = {"a": bias.diag()[:30].sum(), "b": bias.diag()[30:].sum()}
        missed += int(bias.trace() > found.total)
        missed += sum(bool(blocks[name] > found.leaves[name]) for name in blocks)
    assert missed <= 15  # of 300


@pytest.mark.parametrize("net", WHICH)
def test_tf32_is_told_from_float32_by_the_products(net: str) -> None:
    said = {}
    for arithmetic in ("float32", "TF32"):
        matvec, params, truth = case(net, arithmetic, 0)
        found = hf.rounding_of_products(matvec, on(truth, None), hf.rademacher(params, 1)[0])
        said[arithmetic] = hf.kind_of_rounding(found.relative, torch.float32)
    assert said["float32"] == ""
    assert "TF32" in said["TF32"] and "allow_tf32" in said["TF32"]


def deep() -> nn.Module:
    return nn.Sequential(*[layer for _ in range(40) for layer in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 3))


def test_a_deep_net_in_float32_is_not_taken_for_tf32() -> None:
    coarse = seeded(deep).float()
    batch = normal(6, 8).float(), classes(6, 3)
    loss, params = hf.functionalize(coarse, nn.CrossEntropyLoss())
    fine = hf.functionalize(copy.deepcopy(coarse).double(), nn.CrossEntropyLoss())
    exact = plain_product(*fine, converted(batch, torch.float64))
    probe = hf.rademacher(params, 1)[0]
    found = hf.rounding_of_products(plain_product(loss, params, batch), exact, probe)
    assert hf.kind_of_rounding(found.relative, torch.float32) == ""
    emulated = hf.rounding_of_products(under_tf32(plain_product(loss, params, batch)), exact, probe)
    assert "TF32" in hf.kind_of_rounding(emulated.relative, torch.float32)


def test_other_kinds_are_said() -> None:
    assert "bfloat16" in hf.kind_of_rounding(torch.tensor(0.1), torch.bfloat16)
    assert "float64" in hf.kind_of_rounding(1e-6, torch.float64)
    assert hf.kind_of_rounding(1e-14, torch.float64) == ""


def test_what_is_no_comparison_is_refused() -> None:
    d = torch.tensor([3.0, 1.0])
    found = hf.eigsh(lambda v: d * v, torch.ones(2), k=1)
    with pytest.raises(hf.HessfnError, match="in this order"):
        hf.rounding_of_pairs(lambda v: d.double() * v, lambda v: (d * v).float(), found)
    with pytest.raises(hf.HessfnError, match="eigenpairs is"):
        hf.rounding_of_pairs(lambda v: d * v, lambda v: d * v, found.vectors)
    with pytest.raises(hf.HessfnError, match="not finite"):
        hf.rounding_of_products(lambda v: d * v, lambda v: v / 0, torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["float32", "TF32"])
def test_on_a_real_net(arithmetic: str) -> None:
    """ResNet20: without rounding, stated residuals are below the true ones; with it they are not."""
    test_real_net = pytest.importorskip("test_real_net")
    if not all(file.is_file() for file in test_real_net.FILES.values()):
        pytest.skip("no weights and images")
    loss, params, batch, model = test_real_net.resnet20(32)
    fine = hf.functionalize(copy.deepcopy(model).double(), nn.CrossEntropyLoss())
    exact = hf.linearized_hvp(*fine, converted(batch, torch.float64), check=False)
    matvec = plain_product(loss, params, batch)
    matvec = under_tf32(matvec) if arithmetic == "TF32" else matvec
    found = hf.eigsh(
        matvec, hf.gaussian(params, 1)[0], k=4, rtol=1e-4 if arithmetic == "float32" else 1e-3, max_matvecs=25
    )
    rounding = hf.rounding_of_pairs(matvec, exact, found)
    true = []
    for i in range(4):
        q = tree.map(lambda x, i=i: x[i].double(), found.vectors)
        true.append(tree.norm(tree.add(exact(q), q, -found.values[i])))
    true = torch.stack(true)
    assert (true > found.residuals).any()
    assert (true <= found.residuals + rounding).all()
    assert (rounding / true).median() <= 5
    relative = hf.rounding_of_products(matvec, exact, hf.rademacher(params, 1)[0]).relative
    assert ("TF32" in hf.kind_of_rounding(relative, torch.float32)) == (arithmetic == "TF32")
