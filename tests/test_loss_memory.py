"""What is found out about a loss is kept with it: traces, modes and checks, for all products that are made of it."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import classes, needs_compiler, normal, seeded
from torch import Tensor, nn

import hessfn as hf
from hessfn.products.loss_memory import MOST_TRACES, memory_of


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    return normal(n, 4), classes(n, 3)


def counted() -> tuple[Callable[..., Tensor], Any, deque[Any]]:
    calls: deque[Any] = deque()  # which is no number that the loss depends on

    def criterion(out: Tensor, y: Tensor) -> Tensor:
        calls.append(out.shape)
        return F.cross_entropy(out, y)

    return *hf.functionalize(net(), criterion), calls


def exact(loss: Any, params: Any, *args: Any) -> Any:
    """The Hessian's product by plain autograd, of the loss alone."""
    v = hf.gaussian(params, 1)[0]
    leaves = [p.detach().requires_grad_() for p in params.values()]
    gradient = torch.autograd.grad(loss(dict(zip(params, leaves, strict=True)), *args), leaves, create_graph=True)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(gradient, leaves, list(v.values()))])


def product(make: Any, loss: Any, params: Any, *args: Any) -> Tensor:
    return hf.tree.ravel(make(loss, params, *args)(hf.gaussian(params, 1)[0]))[0]


def is_right(found: Tensor, truth: Tensor) -> bool:
    return float((found - truth).norm()) < 1e-9 * float(truth.norm())


class Problem:
    def __init__(self) -> None:
        self.forward, self.params = hf.stateless(net())
        self.calls = 0

    def loss(self, params: Any, batch: Any) -> Tensor:
        self.calls += 1
        return F.cross_entropy(self.forward(params, batch[0]), batch[1])

    def twice(self, params: Any, batch: Any) -> Tensor:
        return 2 * self.loss(params, batch)


def test_a_training_loop_traces_once() -> None:
    """At every step the parameters and the closure are new, and the loss is the same."""
    loss, params, calls = counted()
    at_step = []
    for _ in range(8):
        params = {name: p + 0.01 for name, p in params.items()}
        truth = exact(loss, params, batch())
        calls.clear()
        found = product(hf.hvp, loss, params, batch())
        at_step.append(len(calls))
        assert is_right(found, truth)
    assert at_step[1:3] == [1, 1]  # the loss as it is
    assert at_step[4:] == [0] * 4  # its trace
    assert len(memory_of(loss).traces) == 1


def test_a_single_product_needs_no_trace() -> None:
    loss, params, _ = counted()
    product(hf.hvp, loss, params, batch())
    assert not memory_of(loss).traces


@pytest.mark.parametrize("second", [hf.linearized_hvp, lambda *a: hf.mean_hvp(*a[:2], [a[2]], mode="traced")])
def test_all_products_share_a_trace(second: Any) -> None:
    loss, params, calls = counted()
    product(lambda *a: hf.hvp(*a, mode="traced"), loss, params, batch())
    truth = exact(loss, params, batch())
    product(second, loss, params, batch())  # the check
    before = memory_of(loss).traces
    calls.clear()
    found = product(second, loss, params, batch())
    assert len(calls) <= 2  # linearized_hvp looks at the value, mean_hvp at two parts
    assert is_right(found, truth)
    assert memory_of(loss).traces == before and sum(map(len, before.values())) == 1


def test_batches_of_many_lengths_neither_trace_for_ever_nor_fill_the_memory() -> None:
    loss, params, _ = counted()
    batches = [batch(n) for n in range(2, MOST_TRACES + 8)]
    for _ in range(5):
        found = product(hf.mean_hvp, loss, params, batches)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    assert is_right(found, exact(loss, params, whole))
    assert sum(map(len, memory_of(loss).traces.values())) == MOST_TRACES
    assert is_right(product(hf.linearized_hvp, loss, params, batch(60)), exact(loss, params, batch(60)))
    assert sum(map(len, memory_of(loss).traces.values())) == MOST_TRACES


def test_a_loss_that_changes_at_every_step_is_traced_ever_more_rarely() -> None:
    model, weight, traces = net(), [1.0], 0
    forward, params = hf.stateless(model)

    def loss(params: Any, batch: Any) -> Tensor:
        return weight[0] * F.cross_entropy(forward(params, batch[0]), batch[1])

    for _ in range(40):
        weight[0] *= 0.9
        before = memory_of(loss).traces.copy()
        assert is_right(product(hf.hvp, loss, params, batch()), exact(loss, params, batch()))
        traces += memory_of(loss).traces != before
    assert 1 <= traces <= 4


def test_a_loss_that_counts_its_calls_is_traced_all_the_same() -> None:
    one = Problem()
    for _ in range(6):
        product(hf.hvp, one.loss, one.params, batch())
    before = one.calls
    assert is_right(product(hf.hvp, one.loss, one.params, batch()), exact(one.loss, one.params, batch()))
    assert one.calls == before + 1  # that of the truth


def test_nothing_keeps_a_loss_alive() -> None:
    loss, params, _ = counted()
    for make in (hf.hvp, hf.hvp, hf.hvp, hf.hvp, hf.hvp, hf.linearized_hvp):
        product(make, loss, params, batch())
    gone = weakref.ref(loss)
    del loss
    gc.collect()
    assert gone() is None


def test_a_method_is_one_loss_although_each_access_makes_it_anew() -> None:
    one = Problem()
    for _ in range(6):
        product(hf.hvp, one.loss, one.params, batch())
    assert memory_of(one.loss).traces and not memory_of(one.twice).traces
    both = [product(hf.hvp, method, one.params, batch()) for method in (one.loss, one.twice)]
    assert is_right(2 * both[0], both[1])
    assert not memory_of(Problem().loss).traces


def test_a_loss_that_is_no_longer_finite_is_refused_by_a_new_closure() -> None:
    loss, params, _ = counted()
    for _ in range(5):
        product(hf.hvp, loss, params, batch())
        with pytest.raises(ValueError, match="the loss is nan"):
            product(hf.hvp, loss, {name: p * torch.nan for name, p in params.items()}, batch())


def test_a_trace_is_of_the_casts_that_it_was_made_under() -> None:
    loss, params = hf.functionalize(net().float(), nn.CrossEntropyLoss())
    data = batch()[0].float(), batch()[1]
    plain = [product(hf.hvp, loss, params, data) for _ in range(5)]
    with torch.autocast("cpu", torch.bfloat16):
        cast = [product(hf.hvp, loss, params, data) for _ in range(5)]
    again = product(hf.hvp, loss, params, data)
    torch.testing.assert_close(again, plain[0], rtol=1e-5, atol=1e-6)
    assert all(1e-4 < (c - again).norm() / again.norm() < 0.1 for c in cast)


def test_what_plain_autograd_alone_can_do_is_not_asked_of_a_transform() -> None:
    """Outside, a wrong rule has led to double backward, which vmap cannot do."""

    def loss(w: Tensor) -> Tensor:
        return w[:2].norm() ** 2 + w[2:].norm() ** 2 + w.pow(3).sum()

    w = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="double_backward|difference|kink"):
        outside = hf.hvp(loss, w)(torch.ones_like(w))
    inside = torch.func.vmap(hf.hvp(loss, w))(torch.eye(4, dtype=torch.float64))
    assert outside.shape == (4,) and inside.shape == (4, 4)


def test_modes_that_are_asked_for_are_kept_apart() -> None:
    loss, params, _ = counted()
    truth = exact(loss, params, batch())
    modes = ("auto", "reverse", "traced", "double_backward", "forward")
    for mode, _ in itertools.product(modes, range(5)):
        assert is_right(product(lambda *a, m=mode: hf.hvp(*a, mode=m), loss, params, batch()), truth)


class Masked(nn.Module):
    """As transformers do: where nothing is masked, the mask is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        out = self.inner(x)
        if mask.all():
            return out
        return out * mask[:, None] + 2 * out.roll(1, 1) * (~mask)[:, None] if mask.sum() > 2 else out.square()


def test_a_trace_is_of_the_branch_that_masks_decide() -> None:
    loss, params = hf.functionalize(Masked(), nn.CrossEntropyLoss())
    x, y = batch()
    masks = [torch.ones(8, dtype=torch.bool), torch.arange(8) < 5, torch.arange(8) < 4, torch.arange(8) < 1]
    for mask in masks * 5:
        assert is_right(product(hf.hvp, loss, params, ((x, mask), y)), exact(loss, params, ((x, mask), y)))
        linear = product(hf.linearized_hvp, loss, params, ((x, mask), y))
        assert is_right(linear, exact(loss, params, ((x, mask), y)))
    assert sum(map(len, memory_of(loss).traces.values())) == 3  # two of the masks decide alike


def test_masks_that_decide_one_by_one_do_not_fill_the_memory() -> None:
    loss, params = hf.functionalize(
        net(), lambda out, y: F.cross_entropy(out * (1 + 0.1 * int(y[0] + 3 * y[1] + 9 * y[2])), y)
    )
    x, _ = batch()
    for n in range(27):
        y = torch.tensor([n % 3, n // 3 % 3, n // 9, 0, 1, 2, 0, 1])
        for _ in range(5):
            assert is_right(product(hf.hvp, loss, params, (x, y)), exact(loss, params, (x, y)))
    assert sum(map(len, memory_of(loss).traces.values())) <= MOST_TRACES


def test_a_mode_is_checked_although_another_was() -> None:
    """A constant that the loss makes by a derivative without a graph moves within a trace of torch's rules alone."""
    wrong = torch.tensor([0.5, -0.3, 0.0, 0.0], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return w[:2].norm() ** 2 + w[2:].norm() ** 2 + w.pow(3).sum()

    with pytest.warns(UserWarning, match="mode 'reverse' is not the curvature"):
        hf.hvp(loss, wrong, mode="reverse")(torch.ones_like(wrong))
    with pytest.warns(UserWarning, match="mode 'double_backward' is not the curvature"):
        found = hf.hvp(loss, wrong)(torch.ones_like(wrong))
    torch.testing.assert_close(found, 2 + 6 * wrong, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["double_backward", "forward", "reverse", "traced", "difference"])
def test_a_product_has_a_derivative_by_its_vector_or_refuses_it(mode: Any) -> None:
    loss, params, _ = counted()
    matvec = hf.hvp(loss, params, batch(), mode=mode)
    v, w = hf.gaussian(params, 2)
    leaves = {name: x.clone().requires_grad_() for name, x in v.items()}
    for _ in range(2):
        if mode == "difference":
            with pytest.raises(hf.HessfnError, match="no derivative by the vector"):
                matvec(leaves)
            continue
        found = torch.autograd.grad(hf.tree.dot(matvec(leaves), w), list(leaves.values()))
        assert is_right(torch.cat([x.reshape(-1) for x in found]), hf.tree.ravel(matvec(w))[0])


@pytest.mark.slow
@needs_compiler
def test_a_compiled_function_does_not_depend_on_which_losses_are_remembered() -> None:
    losses = [hf.functionalize(net(), nn.CrossEntropyLoss())[0] for _ in range(10)]
    _, params = hf.functionalize(net(), nn.CrossEntropyLoss())
    for loss in losses:
        product(hf.hvp, loss, params, batch())

    data, kept = batch(), losses[0]

    def compiled(v: Any) -> Any:
        return hf.hvp(kept, params, data)(v)

    v = hf.gaussian(params, 1)[0]
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    found = [hf.tree.ravel(run(v))[0]]
    del losses, loss
    gc.collect()
    found.append(hf.tree.ravel(run(v))[0])
    truth = exact(kept, params, data)
    assert all(is_right(x, truth) for x in found)
