"""Programs whose curvature would be wrong without a word: each is right, refused by name, or warned of."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from nets import classes, normal, seeded
from torch import nn
from torch.func import functional_call

import hessfn as hf


def net(*widths: int) -> nn.Module:
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    return seeded(lambda: nn.Sequential(*layers[:-1]))


def batch(n: int = 8, classes_: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(n, 4), classes(n, classes_)


# A loss that is no function of its parameters


def calls_the_live_model(model: nn.Module, x: Any, y: Any) -> Any:
    return lambda params: F.cross_entropy(model(x), y)


def takes_numbers_out(model: nn.Module, x: Any, y: Any) -> Any:
    return lambda params: F.cross_entropy(functional_call(model, params, (x,)), y).detach() * torch.ones(())


def switches_derivatives_off(model: nn.Module, x: Any, y: Any) -> Any:
    def loss(params: Any) -> Any:
        with torch.no_grad():
            return F.cross_entropy(functional_call(model, params, (x,)), y)

    return loss


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
@pytest.mark.parametrize("build", [calls_the_live_model, takes_numbers_out, switches_derivatives_off])
def test_a_loss_that_does_not_depend_on_its_parameters_is_refused(build: Any, make: Any) -> None:
    model = net(4, 3)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(hf.HessfnError, match="does not depend on its parameters.*functionalize"):
        make(build(model, *batch()), params)(hf.gaussian(params, 1)[0])


# A criterion that reads the live model


def decay(model: nn.Module) -> Any:
    return lambda out, y: F.cross_entropy(out, y) + 0.5 * sum(p.square().sum() for p in model.parameters())


def decay_of_one_layer(model: nn.Module) -> Any:
    return lambda out, y: F.cross_entropy(out, y) + model[0].weight.abs().sum()


class Remembers(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        self.activity = self.inner(x)
        return self.activity


@pytest.mark.parametrize("criterion", [decay, decay_of_one_layer])
def test_a_criterion_that_reads_the_live_parameters_is_refused(criterion: Any) -> None:
    model = net(4, 6, 3)
    loss, params = hf.functionalize(model, criterion(model))
    with pytest.raises(hf.HessfnError, match=r"reads its parameter '.*weight' a second time|'.*bias' a second time"):
        hf.hvp(loss, params, batch())(hf.gaussian(params, 1)[0])


def test_a_criterion_that_reads_what_forward_has_stored_is_refused() -> None:
    model = Remembers(net(4, 3))
    x, y = batch()
    model(x)
    loss, params = hf.functionalize(model, lambda out, y: F.cross_entropy(out, y) + model.activity.square().mean())
    with pytest.raises(hf.HessfnError, match="what forward has stored"):
        hf.hvp(loss, params, (x, y))(hf.gaussian(params, 1)[0])


def test_live_parameters_that_are_constants_of_the_loss_are_not_refused() -> None:
    """Such as those that ``params=`` leaves out, in a loss of one's own."""
    model = net(4, 6, 3)
    x, y = batch()
    params = {"2.weight": model[2].weight.detach()}
    found = hf.hvp(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y), params)(params)
    loss, chosen = hf.functionalize(model, nn.CrossEntropyLoss(), params="2.weight")
    torch.testing.assert_close(found, hf.hvp(loss, chosen, (x, y))(chosen), rtol=1e-10, atol=1e-12)


# A custom autograd.Function means what its backward says


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return (x * 10).round() / 10

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g


class StraightThroughWithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: Any) -> Any:
        return (x * 10).round() / 10

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g


class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (x,) = ctx.saved_tensors
        return g * x.square()  # no derivative of anything: the formula is what counts


@pytest.mark.parametrize("function", [StraightThrough, StraightThroughWithSetup])
def test_a_straight_through_estimator_has_the_curvature_of_its_backward(function: Any) -> None:
    x, y, w = normal(4, 3), normal(4), normal(3)
    with pytest.warns(UserWarning, match="the derivative of its backward"):
        found = hf.dense(hf.hvp(lambda w: ((x @ function.apply(w) - y) ** 2).mean(), w), w)
    torch.testing.assert_close(found, 2 / 4 * x.T @ x, rtol=1e-12, atol=1e-12)


def test_the_formula_of_a_custom_backward_is_differentiated_as_it_stands() -> None:
    w = normal(3)
    with pytest.warns(UserWarning, match="double_backward"):
        found = hf.dense(hf.hvp(lambda w: ClippedGradient.apply(w).square().sum(), w), w)
    # The gradient is 2 out w^2, with out = w; by the formula the derivative of out, too, is w^2.
    torch.testing.assert_close(found, torch.diag(2 * w**4 + 4 * w**2), rtol=1e-12, atol=1e-12)


# A trace is good for what it saw


class Graph:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __repr__(self) -> str:
        return f"Graph(x={list(self.x.shape)})"


class Same:
    """All of them say the same of themselves, and are equal to each other."""

    scale: ClassVar[float] = 1.0

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return "Same"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same)

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("wrapped", "opened"),
    [(Graph, lambda g: g.x), (lambda x: x.numpy(), torch.from_numpy), (lambda x: (x, Same(float(x[0, 0]))), None)],
    ids=["objects", "arrays", "settings"],
)
def test_batches_of_what_a_trace_cannot_see_into_are_not_taken_for_each_other(wrapped: Any, opened: Any) -> None:
    forward, params = hf.stateless(net(4, 3))
    pairs = [(normal(8, 4, seed=i), classes(8, 3, seed=i)) for i in range(3)]

    def inputs(x: Any) -> torch.Tensor:
        return x[0] * x[1].scale if isinstance(x, (tuple, list)) else opened(x)

    def loss(params: Any, pair: Any) -> torch.Tensor:
        return F.cross_entropy(forward(params, inputs(pair[0])), pair[1])

    def plain(params: Any, pair: Any) -> torch.Tensor:
        return F.cross_entropy(forward(params, inputs(wrapped(pair[0]))), pair[1])

    exact = hf.dense(hf.mean_hvp(plain, params, pairs, mode="double_backward", weights=[1, 1, 1]), params)
    found = hf.dense(hf.mean_hvp(loss, params, [(wrapped(x), y) for x, y in pairs]), params)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


# The first product is held against gradients of the loss itself


def norms_squared(w: torch.Tensor) -> torch.Tensor:
    return (w[:2] - 1).square().sum() + 0.5 * w[2:].norm() ** 2


def inverse_of_cholesky(w: torch.Tensor) -> torch.Tensor:
    a = w.reshape(3, 3)
    return torch.cholesky_inverse(torch.linalg.cholesky(a @ a.T + torch.eye(3).to(w))).square().sum()


def product_by_scattering(w: torch.Tensor) -> torch.Tensor:
    return torch.ones(2).to(w).scatter_reduce(0, torch.tensor([0, 0, 1, 1]), w, "prod").square().sum()


def determinant(w: torch.Tensor) -> torch.Tensor:
    return torch.det(w.reshape(2, 2)).square()


WRONG_RULES = {
    "norm squared at zero": (norms_squared, [0.5, -0.3, 0.0, 0.0], "vector_norm"),
    "scatter_reduce, prod": (product_by_scattering, [2.0, 3.0, 4.0, 0.5], "scatter_reduce"),
}


def by_differences(loss: Any, w: torch.Tensor) -> torch.Tensor:
    """The Hessian by central differences of gradients."""
    columns = []
    for e in torch.eye(len(w), dtype=w.dtype):
        grads = [torch.autograd.grad(loss(x := (w + c * e).requires_grad_()), x)[0] for c in (1e-6, -1e-6)]
        columns.append((grads[0] - grads[1]) / 2e-6)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_wrong_rule_of_torch_is_found_named_and_got_round(name: str) -> None:
    loss, point, operation = WRONG_RULES[name]
    w = torch.tensor(point, dtype=torch.float64)
    with pytest.warns(UserWarning, match=f"v'Hv = .* where its gradients give .*{operation}.*Taken is mode"):
        found = hf.dense(hf.hvp(loss, w), w)
    torch.testing.assert_close(found, by_differences(loss, w), rtol=1e-5, atol=1e-5)
    # Products by scattering look at values: they are not traced at all.
    with pytest.raises(hf.Untraceable, match=f"({operation}|value of a tensor).*hvp finds another way"):
        hf.linearized_hvp(loss, w)


def test_what_was_found_wrong_stays_so_for_every_product_of_the_loss() -> None:
    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return norms_squared(w)

    for _ in range(2):
        with pytest.raises(hf.Untraceable, match="not the curvature"):
            hf.linearized_hvp(loss, w)
    with pytest.warns(UserWarning, match="Taken is mode"):
        first = hf.dense(hf.hvp(loss, w), w)
    second = hf.dense(hf.hvp(loss, w), w)  # said once, and right again
    exact = by_differences(loss, w)
    torch.testing.assert_close(first, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second, exact, rtol=1e-5, atol=1e-5)


def test_an_operation_with_a_definition_of_ours_needs_no_other_mode() -> None:
    w = torch.tensor([0.7, -0.2, 0.4, 1.1, 0.3, -0.9, 0.5, 0.8, -0.6], dtype=torch.float64)
    found = hf.dense(hf.linearized_hvp(inverse_of_cholesky, w), w)
    torch.testing.assert_close(found, by_differences(inverse_of_cholesky, w), rtol=1e-5, atol=1e-5)


class KeepsItsGradient(torch.autograd.Function):
    """As fused losses do: the gradient is computed in forward, a constant to whoever differentiates the backward."""

    @staticmethod
    def forward(ctx: Any, w: Any, x: Any) -> Any:
        z = x @ w
        ctx.save_for_backward(x.T @ z.sigmoid() / len(x))
        return F.softplus(z).mean()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g * ctx.saved_tensors[0], None


def test_a_fused_loss_that_keeps_its_gradient_is_told_of() -> None:
    x, w = normal(20, 3), normal(3)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return KeepsItsGradient.apply(w, x) + w.square().sum()

    with pytest.warns(UserWarning, match="v'Hv = .* where its gradients give .*keeps its gradient.*mode='difference'"):
        hf.hvp(loss, w)(w)
    exact = by_differences(lambda w: F.softplus(x @ w).mean() + w.square().sum(), w)
    found = hf.dense(hf.hvp(loss, w, mode="difference"), w)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def test_infinite_parameters_leave_a_right_product_alone() -> None:
    w = torch.tensor([0.0, 1.0, -torch.inf], dtype=torch.float64)
    found = hf.hvp(lambda w: w.exp().sum(), w)(torch.ones(3).double())
    torch.testing.assert_close(found, w.exp())


def test_a_loss_that_narrows_itself_is_not_taken_for_a_wrong_one() -> None:
    w = normal(6)
    for narrow in (torch.Tensor.float, torch.Tensor.cfloat, lambda w: w.type("torch.FloatTensor")):
        hf.hvp(lambda w, narrow=narrow: narrow(w).sin().abs().square().sum(), w)(torch.ones_like(w))


def test_the_determinant_of_an_orthogonal_matrix_is_right_or_warned_of() -> None:
    w = torch.tensor([0.6, 0.8, -0.8, 0.6], dtype=torch.float64)
    exact = by_differences(determinant, w)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = hf.dense(hf.hvp(determinant, w), w)
    assert said or torch.allclose(found, exact, atol=1e-6)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [lambda w: w.abs().sum() + w.square().sum(), lambda w: w.norm() + w.square().sum(), lambda w: w.relu().sum()],
)
def test_a_kink_right_here_is_said(loss: Any) -> None:
    w = torch.zeros(4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="a kink, or jumps, at these very parameters"):
        hf.hvp(loss, w)(torch.tensor([1.0, -2.0, 0.5, 3.0]).double())


def test_a_mode_that_was_asked_for_is_kept_and_warned_of() -> None:
    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="mode 'traced' is not the curvature"):
        hf.hvp(norms_squared, w, mode="traced")(torch.ones_like(w))


def test_nothing_is_said_where_nobody_can_or_should_be_told() -> None:
    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)
    hf.hvp(norms_squared, w, check=False)(torch.ones_like(w))
    hf.linearized_hvp(norms_squared, w, check=False)(torch.ones_like(w))
    torch.func.vmap(hf.hvp(norms_squared, w))(torch.eye(4).double())
    torch.func.grad(lambda w: hf.hvp(lambda w: w.relu().pow(3).sum(), w)(torch.ones_like(w)).sum())(w)


def test_a_loss_is_checked_once_for_its_shapes_however_many_products_are_made_of_it() -> None:
    calls = []

    def loss(w: torch.Tensor) -> torch.Tensor:
        calls.append(w.dtype)
        return w.pow(4).sum()

    w = torch.linspace(0.1, 1.0, 5)
    hf.hvp(loss, w)(torch.ones(5))
    checked = calls.count(torch.float64)
    assert 1 <= checked <= 4
    for _ in range(3):
        hf.hvp(loss, w + 1)(torch.ones(5))
    assert calls.count(torch.float64) == checked
    hf.hvp(loss, torch.ones(6))(torch.ones(6))
    assert calls.count(torch.float64) == 2 * checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_not_taken_for_an_error(dtype: torch.dtype) -> None:
    model = net(4, 30, 30, 3).to(dtype)
    x, y = batch(40)
    loss, params = hf.functionalize(model, lambda out, y: F.cross_entropy(out.float(), y))
    hf.hvp(loss, params, (x.to(dtype), y))(hf.gaussian(params, 1)[0])


def test_constants_that_a_loss_detaches_or_computes_without_derivatives_are_held_fast() -> None:
    def loss(w: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = w.norm()
        return (w**3).sum() / (w.detach().sum() * scale)

    w = torch.arange(1.0, 4.0, dtype=torch.float64)
    found = hf.hvp(loss, w, mode="double_backward")(torch.ones_like(w))
    torch.testing.assert_close(found, 6 * w / (w.sum() * w.norm()), rtol=1e-12, atol=0.0)


# A trace is good for the numbers and tensors that it saw


class Annealed:
    beta = 0.0

    def __call__(self, out: Any, y: Any) -> Any:
        return F.cross_entropy(out, y) + self.beta * out.square().mean()


class AnnealedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.settings = {"beta": 0.0, "target": torch.zeros(3).double()}

    def forward(self, out: Any, y: Any) -> Any:
        return F.cross_entropy(out, y) + self.settings["beta"] * (out - self.settings["target"]).square().mean()


def set_attribute(criterion: Any) -> None:
    criterion.beta = 1.0


def set_entry(criterion: Any) -> None:
    criterion.settings["beta"] = 0.5


def rebind_tensor(criterion: Any) -> None:
    criterion.settings = {"beta": 0.5, "target": torch.ones(3).double()}


@pytest.mark.parametrize(
    ("criterion", "change"), [(Annealed, set_attribute), (AnnealedModule, set_entry), (AnnealedModule, rebind_tensor)]
)
def test_what_a_criterion_holds_may_change_between_products(criterion: Any, change: Any) -> None:
    criterion = criterion()
    loss, params = hf.functionalize(net(4, 3), criterion)
    matvec, v = hf.hvp(loss, params, batch()), hf.gaussian(params, 1)[0]
    before = matvec(v)
    change(criterion)
    after, exact = matvec(v), hf.hvp(loss, params, batch(), mode="double_backward")(v)
    assert hf.find_mode(loss, params, batch()).mode == "traced"
    assert hf.tree.norm(hf.tree.add(after, before, -1.0)) > 0.01 * hf.tree.norm(before)
    assert hf.tree.norm(hf.tree.add(after, exact, -1.0)) < 1e-10 * hf.tree.norm(exact)


def test_what_a_function_closes_over_may_change_between_products() -> None:
    w, scale, target = normal(3), 1.0, normal(3, seed=1)
    weights = [1.0, torch.ones(3).double()]

    def loss(w: torch.Tensor, *, power: int = 4) -> torch.Tensor:
        return scale * ((w - target).pow(power) * weights[1]).sum() * weights[0]

    matvec = hf.hvp(loss, w)

    def expected() -> torch.Tensor:
        return scale * weights[0] * 12 * (w - target) ** 2 * weights[1]

    ones = torch.ones_like(w)
    torch.testing.assert_close(matvec(ones), expected())
    scale = 2.0
    torch.testing.assert_close(matvec(ones), expected())
    target = normal(3, seed=2)
    torch.testing.assert_close(matvec(ones), expected())
    target.add_(1.0)
    torch.testing.assert_close(matvec(ones), expected())
    weights[0] = 3.0
    torch.testing.assert_close(matvec(ones), expected())
    weights[1].mul_(2.0)
    torch.testing.assert_close(matvec(ones), expected())


def test_statistics_that_a_model_goes_on_collecting_are_those_of_now() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)))
    x, y = batch()
    loss, params = hf.functionalize(model.eval(), nn.CrossEntropyLoss())
    matvec, v = hf.hvp(loss, params, (x, y)), hf.gaussian(params, 1)[0]
    matvec(v)
    model.train()(3 * x + 1)
    exact = hf.hvp(loss, params, (x, y), mode="double_backward")(v)
    assert hf.tree.norm(hf.tree.add(matvec(v), exact, -1.0)) < 1e-10 * hf.tree.norm(exact)


def test_an_optimiser_that_steps_leads_to_no_new_trace() -> None:
    model, calls = net(4, 3), []

    def criterion(out: Any, y: Any) -> Any:
        calls.append(out.shape)
        return F.cross_entropy(out, y)

    loss, params = hf.functionalize(model, criterion)
    matvec, v = hf.hvp(loss, params, batch(), mode="traced"), hf.gaussian(params, 1)[0]
    matvec(v)
    traced = len(calls)
    for p in model.parameters():
        p.data.add_(0.1)
    exact = hf.hvp(loss, params, batch(), mode="double_backward", check=False)
    found, after = matvec(v), len(calls)
    assert after == traced > 0
    assert hf.tree.norm(hf.tree.add(found, exact(v), -1.0)) < 1e-10 * hf.tree.norm(found)


def test_a_warning_points_at_the_line_of_the_user() -> None:
    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)

    def loss(w: Any) -> Any:
        return norms_squared(w)

    def of_batch(w: Any, batch: Any) -> Any:
        return norms_squared(w) * batch.mean()

    makers = (
        lambda: hf.hvp(loss, w),
        lambda: hf.mean_hvp(of_batch, w, [torch.ones(3, dtype=torch.float64)]),
    )
    for make in makers:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            make()(torch.ones_like(w))
        assert {one.filename for one in said} == {__file__}


@pytest.mark.parametrize("make", [hf.hvp, hf.linearized_hvp])
@pytest.mark.parametrize(
    "loss",
    [
        lambda w: torch.where(w > 0, w.sqrt(), 0 * w).sum(),
        lambda w: torch.where(w > 0, w.pow(0.3), w).sum(),
        lambda w: torch.where(w > 0.5, (w / w.sign().relu()).sin(), w).sum(),
    ],
)
def test_a_gradient_that_is_not_finite_is_an_error(loss: Any, make: Any) -> None:
    w = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    with pytest.raises(hf.HessfnError, match="curvature is not. Of torch.where"):
        make(loss, w)(torch.ones_like(w))


def test_what_is_not_finite_within_a_loss_does_not_hide_which_rule_is_wrong() -> None:
    """The root has no slope at zero, and none is asked for: it is detached."""
    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)

    def loss(w: Any) -> Any:
        return norms_squared(w) + (w.sqrt().nan_to_num().detach() * 0 * w).sum()

    with pytest.warns(UserWarning, match="norm"):
        found = hf.hvp(loss, w)(torch.ones_like(w))
    torch.testing.assert_close(found, w.new_tensor([2.0, 2.0, 1.0, 1.0]), rtol=1e-6, atol=1e-6)


def test_differences_that_see_a_constant_move_are_not_taken() -> None:
    """Differences of plain gradients do not hold fast what is detached; where no other mode is right, none is."""
    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)

    def loss(w: Any) -> Any:
        return norms_squared(w) + (w.cos().detach() * w.sin()).sum()

    with pytest.raises(hf.HessfnError, match="difference.*not what gradients of the loss say"):
        hf.hvp(loss, w)(torch.ones_like(w))
    with pytest.warns(UserWarning, match="mode 'difference' is not the curvature"):
        hf.hvp(loss, w, mode="difference")(torch.ones_like(w))
