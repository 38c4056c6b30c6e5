"""Matvecs whose numbers would be wrong without a word: not finite, in another order, differentiated, complex."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from nets import problem
from spectra import on, symmetric
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jvp, vmap

import hessfn as hf
from hessfn.core import tree
from hessfn.core.errors import InvalidInput
from hessfn.core.watched import Watched

LIKE = {"w": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
SORTED = dict(sorted(LIKE.items()))
SIGNS = hf.rademacher(LIKE, 6)
START = hf.gaussian(LIKE, 1)[0]
A = symmetric(torch.arange(1.0, 9.0))


def pairs(matvec: Any) -> hf.EigenPairs:
    return hf.eigsh(matvec, START, 2, rtol=None, max_matvecs=8)


# Every routine that takes products, with and without a tolerance.
CONSUMERS: dict[str, Callable[[Any], Any]] = {
    "power_iter": lambda m: hf.power_iter(m, START, max_matvecs=5),
    "power_iter, fixed": lambda m: hf.power_iter(m, START, max_matvecs=5, rtol=None),
    "lanczos": lambda m: hf.lanczos(m, START, 5)[:2],
    "eigsh": lambda m: hf.eigsh(m, START, 2).values,
    "eigsh, fixed": lambda m: pairs(m).values,
    "solve": lambda m: hf.solve(m, START).x,
    "solve, fixed": lambda m: hf.solve(m, START, rtol=None, max_matvecs=6)[:2],
    "hutchinson": lambda m: hf.hutchinson(m, SIGNS),
    "hutchinson, groups": lambda m: hf.hutchinson(m, SIGNS, batch_size=3),
    "hutchinson, rtol": lambda m: hf.hutchinson(m, SIGNS, rtol=0.1),
    "hutchinson_per_leaf": lambda m: hf.hutchinson_per_leaf(m, SIGNS),
    "hutchinson_per_sample": lambda m: hf.hutchinson_per_sample(m, SIGNS),
    "hutchinson_diag": lambda m: hf.hutchinson_diag(m, SIGNS),
    "squared_row_norms": lambda m: hf.squared_row_norms(m, SIGNS),
    "squared_frobenius": lambda m: hf.squared_frobenius(m, SIGNS),
    "hutchpp": lambda m: hf.hutchpp(m, SIGNS),
    "xtrace": lambda m: hf.xtrace(m, SIGNS),
    "xdiag": lambda m: hf.xdiag(m, SIGNS),
    "deflated_trace": lambda m: hf.deflated_trace(m, SIGNS, pairs(on(A, LIKE))),
    "slq": lambda m: hf.slq(m, SIGNS, 4),
    "slq, groups": lambda m: hf.slq(m, SIGNS, 4, batch_size=3),
    "slq, orthogonalised": lambda m: hf.slq(m, SIGNS, 4, orthogonalize=True),
    "dense": lambda m: hf.dense(m, LIKE),
    "as_linear_operator": lambda m: torch.from_numpy(hf.as_linear_operator(m, LIKE).matvec(np.ones(8))),
    "restrict": lambda m: hf.dense(hf.restrict(m, LIKE, "w"), {"w": LIKE["w"]}),
    "block": lambda m: hf.squared_frobenius(hf.block(m, LIKE, "b", "w"), hf.rademacher({"w": LIKE["w"]}, 3)),
    "deflate": lambda m: hf.dense(hf.deflate(m, pairs(on(A, LIKE)).vectors), LIKE),
    "check_matvec": lambda m: hf.check_matvec(m, LIKE),
    "check_slice": lambda m: hf.check_slice(m, cubes, LIKE_ONES, START),
}
LIKE_ONES = tree.map(torch.ones_like, LIKE)


def cubes(params: Any) -> Tensor:
    flat = tree.ravel({name: params[name] for name in LIKE})[0]
    return flat @ A @ flat / 2


consumers = pytest.mark.parametrize("consume", CONSUMERS)


# Not finite


def spoiled(value: float, *, first: int = 1, leaf: str = "b") -> Any:
    """Products with A, of which from some number on one entry of one leaf is not finite."""
    calls = []

    def matvec(v: Any) -> Any:
        calls.append(0)
        product = on(A, LIKE)(v)
        if len(calls) >= first:
            product[leaf] = torch.cat([product[leaf].flatten()[:-1], torch.full((1,), value).double()]).view_as(v[leaf])
        return product

    return matvec


@consumers
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_an_error_that_names_the_leaf(consume: str, value: float) -> None:
    with pytest.raises(hf.HessfnError, match="not finite" if "groups" in consume else r"not finite in leaf '(b|w)'"):
        CONSUMERS[consume](spoiled(value, leaf="w" if consume in ("restrict", "hutchinson_per_sample") else "b"))


@pytest.mark.parametrize(
    "consume", ["hutchinson", "hutchinson_diag", "lanczos", "dense", "xtrace", "slq", "eigsh, fixed"]
)
def test_the_product_is_named_by_its_number(consume: str) -> None:
    with pytest.raises(hf.HessfnError, match="product 3 of the matvec is not finite in leaf 'w'"):
        CONSUMERS[consume](spoiled(float("nan"), first=3, leaf="w"))


def test_elsewhere_than_on_the_cpu_nobody_waits_for_a_flag_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the products were on a GPU."""
    product = Watched(spoiled(float("inf"), first=2))
    monkeypatch.setattr("hessfn.core.watched.on_cpu", lambda x: False)
    for z in SIGNS:
        product(z)
    with pytest.raises(hf.HessfnError, match="product 2 of the matvec is not finite in leaf 'b'"):
        product.finished(torch.ones(()))


@pytest.mark.parametrize("consume", ["hutchinson", "lanczos", "slq", "dense", "eigsh, fixed"])
def test_under_vmap_no_value_is_asked(consume: str) -> None:
    scaled = vmap(lambda c: CONSUMERS[consume](lambda v: tree.scale(c, on(A, LIKE)(v))))(torch.tensor([1.0, 2.0]))
    plain = CONSUMERS[consume](on(A, LIKE))
    under = dict(zip(tree.names(scaled), tree.leaves(scaled), strict=True))
    for name, y in zip(tree.names(plain), tree.leaves(plain), strict=True):
        torch.testing.assert_close(under.pop(name)[0], y, rtol=1e-9, atol=1e-9)
    assert all(x.isnan().all() for x in under.values())  # of what is not measured, where vmap takes no None


# Leaves meet by name


def other_order(v: Any) -> Any:
    """As products that were read from a file whose names are sorted."""
    return dict(sorted(on(A, LIKE)({name: v[name] for name in LIKE}).items()))


@consumers
def test_a_product_in_another_order_of_keys_is_the_same(consume: str) -> None:
    plain = CONSUMERS[consume](on(A, LIKE))
    found = CONSUMERS[consume](other_order)
    if plain is not None:  # as of a check
        tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9), plain, found)


def exactly(consume: Callable[[Any, Any], Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(consume(on(A, LIKE), LIKE), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(consume(by_name, SORTED), expected, rtol=1e-8, atol=1e-8)


def by_name(v: Any) -> Any:
    """Products as :func:`hvp` makes them, in the order of its parameters, from vectors in any."""
    return on(A, LIKE)({name: v[name] for name in LIKE})


def test_vectors_in_another_order_of_keys_give_the_same_numbers() -> None:
    exactly(lambda m, like: hf.dense(m, like).trace(), A.trace())
    exactly(lambda m, like: hf.eigsh(m, hf.gaussian(like, 1)[0], 2).values, torch.tensor([8.0, 7.0]).double())
    signs = [tree.unflatten(row.split([6, 2]), LIKE) for row in torch.eye(8).double() * 8**0.5]
    signs = [{"w": z["w"].view(2, 3), "b": z["b"]} for z in signs]
    exactly(lambda m, like: hf.hutchinson(m, [{k: z[k] for k in like} for z in signs]).mean, A.trace())
    exactly(lambda m, like: hf.squared_frobenius(m, [{k: z[k] for k in like} for z in signs]).mean, A.square().sum())


def test_eigenpairs_in_another_order_of_keys_are_deflated() -> None:
    found = hf.eigsh(on(A, LIKE), START, 2, rtol=1e-9)
    turned = found._replace(vectors=dict(sorted(found.vectors.items())))
    rest = hf.dense(hf.deflate(on(A, LIKE), turned.vectors), LIKE)
    torch.testing.assert_close(torch.linalg.eigvalsh(rest)[-1], torch.tensor(6.0).double(), rtol=1e-6, atol=0)
    for pairs_ in (found, turned):
        torch.testing.assert_close(
            hf.deflated_trace(on(A, LIKE), SIGNS, pairs_).mean,
            hf.deflated_trace(on(A, LIKE), SIGNS, found).mean,
            rtol=1e-10,
            atol=0,
        )
    counts = {int(hf.eigsh(on(A, LIKE), START, 2, warm_start=p.vectors).num_matvecs) for p in (found, turned)}
    assert len(counts) == 1


@pytest.mark.parametrize("combine", [tree.dot, tree.add])
def test_two_trees_are_never_paired_by_position(combine: Any) -> None:
    x, y = hf.gaussian(LIKE, 2)
    for a, b in zip(tree.leaves(combine(x, dict(sorted(y.items())))), tree.leaves(combine(x, y)), strict=True):
        assert torch.equal(a, b)
    for other, message in (
        ({"w": x["w"]}, r"missing \['b'\]"),
        ({"w": x["w"], "c": x["b"]}, r"unexpected \['c'\]"),
        ({"w": x["w"], "b": x["b"][:, None]}, r"leaf 'b' of the second tree has shape \(2, 1\)"),
        ({"w": x["w"].T, "b": x["b"]}, "leaf 'w'"),
    ):
        with pytest.raises(hf.HessfnError, match=message):
            combine(x, other)


@pytest.mark.parametrize("consume", ["hutchinson", "hutchinson_diag", "dense", "deflate", "eigsh", "restrict"])
def test_a_product_of_other_leaves_is_refused(consume: str) -> None:
    for wrong, message in (
        (lambda v: {"w": v["w"]}, "missing"),
        (lambda v: {"w": v["w"], "b": v["b"][:, None]}, "leaf 'b' of the product has shape"),
        (lambda v: {"w": v["w"], "b": v["b"].numpy()}, "not a tensor"),
    ):
        with pytest.raises(hf.HessfnError, match=message):
            CONSUMERS[consume](wrong)


# A derivative is right or refused

TOLERANT = {
    "eigsh": lambda m: hf.eigsh(m, START, 1).values[0],
    "power_iter": lambda m: hf.power_iter(m, START, max_matvecs=500).value,
    "hutchinson": lambda m: hf.hutchinson(m, SIGNS, rtol=1e-3).mean,
    "deflated_trace": lambda m: hf.deflated_trace(m, SIGNS, pairs(m), rtol=1e-3).mean,
}
FIXED = {
    "eigsh": lambda m: pairs(m).values[0],
    "power_iter": lambda m: hf.power_iter(m, START, max_matvecs=400, rtol=None).value,
    "hutchinson": lambda m: hf.hutchinson(m, SIGNS).mean,
    "deflated_trace": lambda m: hf.deflated_trace(m, SIGNS, pairs(m)).mean,
}
ONE = torch.tensor(2.0, dtype=torch.float64)


def derivatives(number: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Tensor]]:
    """That of a function of one number at 2, by every way of torch."""

    def backward() -> Tensor:
        s = ONE.clone().requires_grad_()
        return torch.autograd.grad(number(s), s)[0]

    def dual() -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            s = torch.autograd.forward_ad.make_dual(ONE, torch.ones_like(ONE))
            return torch.autograd.forward_ad.unpack_dual(number(s)).tangent

    return {
        "backward": backward,
        "dual": dual,
        "grad": lambda: grad(number)(ONE),
        "jvp": lambda: jvp(number, (ONE,), (torch.ones_like(ONE),))[1],
        "grad of vmap": lambda: grad(lambda s: vmap(number)(s[None])[0])(ONE),
        "vmap of grad": lambda: vmap(grad(number))(ONE[None])[0],
    }


WAYS = derivatives(lambda s: s)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routine", TOLERANT)
def test_what_stopped_by_a_tolerance_has_no_derivative_and_says_so(routine: str, way: str) -> None:
    with pytest.raises(InvalidInput, match="pass rtol=None"):
        derivatives(lambda s: TOLERANT[routine](lambda v: tree.scale(s, on(A, LIKE)(v))))[way]()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routine", FIXED)
def test_the_remedy_is_right(routine: str, way: str) -> None:
    def number(s: Tensor) -> Tensor:
        return FIXED[routine](lambda v: tree.scale(s, on(A, LIKE)(v)))

    torch.testing.assert_close(derivatives(number)[way](), number(ONE) / 2, rtol=1e-6, atol=0)


def test_no_derivative_is_needed_for_a_number() -> None:
    """Of what does not depend on what is differentiated, or of what is detached, there is none to be wrong."""
    live = ONE.clone().requires_grad_()
    for routine in TOLERANT.values():
        with torch.no_grad():
            number = routine(lambda v: tree.scale(live, on(A, LIKE)(v)))
        assert float(grad(lambda s: s * routine(on(A, LIKE)))(ONE)) == pytest.approx(float(number) / 2, rel=1e-6)  # noqa: B023
        found = grad(lambda s: s * routine(lambda v: tree.scale(s.detach(), on(A, LIKE)(v))))(ONE)  # noqa: B023
        assert float(found) == pytest.approx(float(number), rel=1e-6)


def test_a_derivative_without_that_of_its_eigenpairs_is_refused() -> None:
    constant = hf.eigsh(on(A, LIKE), START, 2)

    def number(s: Tensor) -> Tensor:
        return hf.deflated_trace(lambda v: tree.scale(s, on(A, LIKE)(v)), SIGNS, constant).mean

    for way in ("backward", "dual", "grad"):
        with pytest.raises(InvalidInput, match="eigenpairs have none"):
            derivatives(number)[way]()


@pytest.mark.parametrize("way", WAYS)
def test_a_slice_curvature_has_no_derivative(way: str) -> None:
    def number(s: Tensor) -> Tensor:
        return hf.slice_curvature(lambda p: cubes(p) ** 2, tree.scale(s, LIKE_ONES), START).value

    with pytest.raises(InvalidInput, match="no derivative"):
        derivatives(number)[way]()
    torch.testing.assert_close(vmap(number)(ONE[None])[0], number(ONE), rtol=1e-4, atol=0)


# The product of linearized_hvp is a linear map


@pytest.mark.parametrize("net", ["mlp", "conv", "batch_norm", "attention"])
def test_a_linearized_product_has_every_derivative_by_its_vector(net: str) -> None:
    loss, params, batch, _ = problem(net)
    matvec = hf.linearized_hvp(loss, params, batch)
    H, (flat, unravel) = hf.dense(matvec, params), tree.ravel(params)
    v, u = torch.randn(2, len(flat), dtype=flat.dtype, generator=torch.Generator().manual_seed(0))

    def product(x: Tensor) -> Tensor:
        return tree.ravel(matvec(unravel(x)))[0]

    def half(x: Tensor) -> Tensor:
        return 0.5 * x @ product(x)

    def backward(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(half(x), x)[0]

    def twice(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(torch.autograd.grad(half(x), x, create_graph=True)[0] @ u, x)[0]

    def dual(x: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(x, u)
            return torch.autograd.forward_ad.unpack_dual(product(x)).tangent

    V = torch.stack([v, u, v + u])
    for found, expected in (
        (grad(half)(v), H @ v),
        (backward(v), H @ v),
        (twice(v), H @ u),
        (dual(v), H @ u),
        (jvp(product, (v,), (u,))[1], H @ u),
        (jvp(grad(half), (v,), (u,))[1], H @ u),
        (grad(lambda x: grad(half)(x) @ u)(v), H @ u),
        (grad(lambda x: jvp(half, (x,), (u,))[1])(v), H @ u),
        (vmap(grad(half))(V), V @ H),
        (grad(lambda X: vmap(half)(X).sum())(V), V @ H),
        (vmap(lambda x: jvp(product, (v,), (x,))[1])(V), V @ H),
        (jacfwd(product)(v), H),
        (hessian(half)(v), H),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("way", ["backward", "dual", "grad", "jvp", "vmap of grad"])
def test_a_linearized_product_of_what_is_differentiated_is_refused(argument: int, way: str) -> None:
    def number(s: Tensor) -> Tensor:
        point = [torch.ones(3).double(), torch.ones(3).double()]
        point[argument] = s * point[argument]
        return hf.linearized_hvp(lambda w, x: (w**3 * x).sum(), *point)(torch.ones(3).double()).sum()

    with pytest.raises(InvalidInput, match="take hvp"):
        derivatives(number)[way]()
    with torch.no_grad():
        assert float(number(ONE.clone().requires_grad_())) == 36.0


# SciPy's vectors


def test_a_complex_vector_is_multiplied_in_both_its_parts() -> None:
    operator, z = hf.as_linear_operator(on(A, LIKE), LIKE), np.arange(8) + 1j * np.arange(8)[::-1]
    np.testing.assert_allclose(operator.matvec(z), A.numpy() @ z, rtol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(z), A.numpy() @ z, rtol=1e-12)
    waves = scipy.sparse.linalg.expm_multiply(1j * operator, z, traceA=36j)
    np.testing.assert_allclose(waves, scipy.linalg.expm(1j * A.numpy()) @ z, rtol=1e-8)
    shifted = operator - 1j * scipy.sparse.linalg.aslinearoperator(np.eye(8))
    found, failed = scipy.sparse.linalg.gmres(shifted, z, rtol=1e-10)
    assert not failed
    np.testing.assert_allclose(found, np.linalg.solve(A.numpy() - 1j * np.eye(8), z), rtol=1e-6)


def test_views_that_run_backwards_and_integers_are_vectors() -> None:
    operator = hf.as_linear_operator(on(A, LIKE), LIKE)
    for z in (np.arange(8.0)[::-1], np.arange(16.0)[::2], np.arange(8), np.broadcast_to(1.0, 8)):
        np.testing.assert_allclose(operator.matvec(z), A.numpy() @ z, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_float32(dtype: torch.dtype) -> None:
    like = {"w": torch.zeros(4, dtype=dtype), "b": torch.zeros(1, dtype=dtype)}
    operator = hf.as_linear_operator(lambda v: tree.scale(2.0, v), like)
    assert operator.dtype == np.float32
    np.testing.assert_array_equal(operator.matvec(np.ones(5)), 2 * np.ones(5))
