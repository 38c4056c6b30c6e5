"""A mean over batches is that of the whole data set, or refused: by the loss, by its parts, by processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import classes, normal, seeded
from test_distributed import pytestmark as needs_processes
from test_distributed import raised, run
from torch import Tensor, nn

import hessfn as hf
from hessfn.core import tree
from hessfn.parallel.all_reduce import ShardedBatches

CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)
X, LABELS = normal(24, 4), classes(24, 3)


def net() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def halves(x: Any, y: Any, cut: int = 7) -> list[Any]:
    return [(x[:cut], y[:cut]), (x[cut:], y[cut:])]


def off(matvec: Any, whole: Any, params: Any) -> float:
    found, expected = hf.dense(matvec, params), hf.dense(whole, params)
    return float((found - expected).norm() / expected.norm())


# Torch's own criteria: what a batch weighs is what its mean is divided by


def some_ignored(y: Tensor) -> Tensor:
    return torch.where(torch.arange(len(y)) % 4 == 0, -100, y)


KNOWN: dict[str, tuple[Any, Any]] = {
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), LABELS),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=2), LABELS),
    "ignored labels": (nn.CrossEntropyLoss(), some_ignored(LABELS)),
    "both": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=2), LABELS),
    "smoothed": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.1, ignore_index=0), LABELS),
    "probabilities": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), normal(24, 3).softmax(1)),
    "function": (F.cross_entropy, some_ignored(LABELS)),
    "partial": (functools.partial(F.cross_entropy, weight=CLASS_WEIGHTS), LABELS),
    "mean of squares": (nn.MSELoss(), normal(24, 3, seed=1)),
    "Huber": (nn.HuberLoss(), normal(24, 3, seed=1)),
    "logits": (nn.BCEWithLogitsLoss(), normal(24, 3).sigmoid()),
    "divergence": (nn.KLDivLoss(reduction="batchmean"), normal(24, 3).softmax(1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_the_mean_over_batches_is_that_of_all_samples(name: str) -> None:
    criterion, y = KNOWN[name]
    loss, params = hf.functionalize(net(), criterion)
    whole = hf.hvp(loss, params, (X, y))
    assert off(hf.mean_hvp(loss, params, halves(X, y)), whole, params) < 1e-12
    for microbatch in (1, 5):
        assert off(hf.mean_hvp(loss, params, [(X, y)], microbatch=microbatch), whole, params) < 1e-12


def test_logarithms_of_probabilities_are_weighed_alike() -> None:
    model = nn.Sequential(net(), nn.LogSoftmax(1))
    loss, params = hf.functionalize(model, nn.NLLLoss(weight=CLASS_WEIGHTS, ignore_index=2))
    assert off(hf.mean_hvp(loss, params, halves(X, LABELS)), hf.hvp(loss, params, (X, LABELS)), params) < 1e-12


def test_labels_of_several_positions_are_counted() -> None:
    model = seeded(lambda: nn.Conv1d(2, 3, 1))
    x, y = normal(10, 2, 4), some_ignored(classes(40, 3)).reshape(10, 4)
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss(weight=CLASS_WEIGHTS))
    assert off(hf.mean_hvp(loss, params, halves(x, y, 3)), hf.hvp(loss, params, (x, y)), params) < 1e-12


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss])
def test_a_sum_is_refused_by_name(criterion: Any) -> None:
    y = LABELS if criterion is nn.CrossEntropyLoss else normal(24, 3).sigmoid()
    loss, params = hf.functionalize(net(), criterion(reduction="sum"))
    v = hf.gaussian(params, 1)[0]
    with pytest.raises(hf.HessfnError, match=rf'{criterion.__name__}\(reduction="sum"\).*reduction="mean"'):
        hf.mean_hvp(loss, params, halves(X, y))(v)
    hf.mean_hvp(loss, params, halves(X, y), weights=[1, 1])(v)
    assert off(hf.mean_hvp(loss, params, [(X, y)]), hf.hvp(loss, params, (X, y)), params) < 1e-12


def test_batches_of_nothing_that_counts_are_left_out() -> None:
    loss, params = hf.functionalize(net(), nn.CrossEntropyLoss())
    nothing = torch.full_like(LABELS, -100)
    matvec = hf.mean_hvp(loss, params, [(X, LABELS), (X, nothing)])
    assert off(matvec, hf.hvp(loss, params, (X, LABELS)), params) < 1e-12
    with pytest.raises(hf.HessfnError, match="the weights of all batches are 0"):
        hf.mean_hvp(loss, params, [(X, nothing), (X, nothing)])(hf.gaussian(params, 1)[0])


# All others are held against two parts of the first batch


def by_class(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, weight=CLASS_WEIGHTS)


def over_kept(out: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(out, y, reduction="none")
    return each[y != 2].mean()


OWN: dict[str, Callable[..., Tensor]] = {
    "class weights": by_class,
    "masked": over_kept,
    "sum": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "root of a mean": lambda out, y: F.cross_entropy(out, y).sqrt(),
    "contrast": lambda out, y: (out @ out.T).logsumexp(1).mean(),
}


@pytest.mark.parametrize("name", OWN)
def test_a_loss_that_is_no_mean_over_samples_is_refused(name: str) -> None:
    loss, params = hf.functionalize(net(), OWN[name])
    v = hf.gaussian(params, 1)[0]
    for microbatch in (None, 1):
        with pytest.raises(hf.HessfnError, match="no mean over samples by these weights.*weights=.*check=False"):
            hf.mean_hvp(loss, params, halves(X, LABELS), microbatch=microbatch)(v)
    hf.mean_hvp(loss, params, halves(X, LABELS), check=False)(v)
    assert off(hf.mean_hvp(loss, params, [(X, LABELS)]), hf.hvp(loss, params, (X, LABELS)), params) < 1e-12


def test_weights_that_are_given_make_it_right() -> None:
    loss, params = hf.functionalize(net(), by_class)
    whole = hf.hvp(loss, params, (X, LABELS))
    by_weight = lambda batch: CLASS_WEIGHTS[batch[1]].sum()  # noqa: E731
    assert off(hf.mean_hvp(loss, params, halves(X, LABELS), weights=by_weight), whole, params) < 1e-12
    assert off(hf.mean_hvp(loss, params, [(X, LABELS)], weights=by_weight, microbatch=3), whole, params) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mean_of_ones_own_passes_in_every_dtype(dtype: torch.dtype) -> None:
    loss, params = hf.functionalize(net().to(dtype), lambda out, y: F.cross_entropy(out, y))
    hf.mean_hvp(loss, params, halves(X.to(dtype), LABELS))(hf.gaussian(params, 1)[0])
    loss, params = hf.functionalize(net().to(dtype), lambda out, y: F.cross_entropy(out.double(), y))
    hf.mean_hvp(loss, params, halves(X.to(dtype), LABELS))(hf.gaussian(params, 1)[0])


def test_a_loss_is_held_against_its_parts_once() -> None:
    calls: list[int] = []

    def loss(w: Tensor, x: Tensor) -> Tensor:
        calls.append(len(x))
        return (x @ w).square().mean()

    w = normal(4)
    for _ in range(3):
        hf.mean_hvp(loss, w, [X[:12], X[12:]], mode="double_backward", check=True)(w)
    assert calls.count(4) == calls.count(8) == 1


def test_a_loss_of_batches_that_have_no_parts_is_left_be() -> None:
    """The samples of such a batch are not along one axis, as of graphs."""
    batches = [(normal(6, 4), normal(3, 1)), (normal(8, 4), normal(5, 1))]
    w = normal(4)

    def loss(w: Tensor, batch: Any) -> Tensor:
        return (batch[0] @ w).square().sum() * batch[1].sum()

    hf.mean_hvp(loss, w, batches)(w)


def test_batch_norm_in_training_mode_has_no_parts() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    v = {name: normal(*p.shape) for name, p in model.named_parameters()}
    for criterion in (nn.CrossEntropyLoss(), lambda out, y: F.cross_entropy(out, y)):
        loss, params = hf.functionalize(model.train(), criterion)
        hf.mean_hvp(loss, params, halves(X, LABELS))(v)
        with pytest.raises(hf.HessfnError, match=r"BatchNorm1d '1'.*samples meet.*model.eval"):
            hf.mean_hvp(loss, params, halves(X, LABELS), microbatch=4)
        with pytest.raises(hf.HessfnError, match=r"BatchNorm1d '1'.*samples meet"):
            hf.sensitivities(model, criterion, halves(X, LABELS), num_probes=1, microbatch=4)
        loss, params = hf.functionalize(model.eval(), criterion)
        assert (
            off(hf.mean_hvp(loss, params, [(X, LABELS)], microbatch=4), hf.hvp(loss, params, (X, LABELS)), params)
            < 1e-12
        )


def test_a_random_loss_is_refused_as_such() -> None:
    w = normal(4)
    with pytest.raises(hf.HessfnError, match="draws random numbers"):
        hf.mean_hvp(lambda w, x: (x @ w + torch.randn(())).square().mean(), w, [X[:9], X[9:]])(w)


# Traces of layers, the Fisher matrix, the report


@pytest.mark.parametrize("name", ["class weights", "ignored class", "smoothed"])
def test_traces_of_layers_are_those_of_all_samples(name: str) -> None:
    criterion, y = KNOWN[name]
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3)))
    loss, params = hf.functionalize(model, criterion, params="0.weight")
    exact = hf.dense(hf.hvp(loss, params, (X, y)), params).trace()
    of_flow, shift = hf.activation_loss(model, criterion, (X, y), "0")
    for batches, microbatch in ((halves(X, y), None), ([(X, y)], 5)):
        found = hf.sensitivities(model, criterion, batches, num_probes=60, microbatch=microbatch)
        assert abs(found.weights.mean["0"] - exact) < 5 * found.weights.stderr["0"]
        exact_flow = hf.dense(hf.hvp(of_flow, shift), shift).trace()
        assert abs(found.activations.mean["0"] - exact_flow) < 5 * found.activations.stderr["0"]
        flow = hf.activation_traces(model, criterion, batches, "0", 60, microbatch=microbatch)
        assert abs(flow.mean["0"] - exact_flow) < 5 * flow.stderr["0"]


@pytest.mark.parametrize("name", OWN)
def test_traces_of_a_loss_that_is_no_mean_are_refused(name: str) -> None:
    for make in (
        lambda: hf.sensitivities(net(), OWN[name], halves(X, LABELS), num_probes=1),
        lambda: hf.activation_traces(net(), OWN[name], halves(X, LABELS), "0", 1),
    ):
        with pytest.raises(hf.HessfnError, match="no mean over samples"):
            make()


@pytest.mark.parametrize("name", ["class weights", "ignored class", "both", "smoothed", "partial", "probabilities"])
def test_the_fisher_matrix_is_that_of_shares_of_the_mean_loss(name: str) -> None:
    criterion, y = KNOWN[name]
    forward, params = hf.stateless(net())
    kept = dict(criterion.keywords) if isinstance(criterion, functools.partial) else {
        key: getattr(criterion, key) for key in ("weight", "ignore_index", "label_smoothing")
    }  # fmt: skip
    leaves = {key: p.clone().requires_grad_() for key, p in params.items()}
    shares = [
        F.cross_entropy(forward(leaves, X[i : i + 1]), y[i : i + 1], **kept, reduction="sum") for i in range(len(X))
    ]
    total = criterion(forward(leaves, X), y)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(s, list(leaves.values()), retain_graph=True)])
        for s in shares
    ]
    g = torch.stack(rows) * len(X) / (torch.stack(shares).sum() / total).detach()
    found = hf.dense(hf.fvp(forward, criterion, params, (X, y)), params)
    torch.testing.assert_close(found, g.T @ g / len(X), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["class weights", "masked", "root of a mean"])
def test_the_fisher_matrix_of_a_loss_that_is_no_mean_is_refused(name: str) -> None:
    forward, params = hf.stateless(net())
    criterion = OWN[name] if name != "masked" else lambda out, y: (w := (y != 2).double()) @ F.cross_entropy(
        out, y, reduction="none"
    ) / (w.sum() + 1e-9)  # fmt: skip
    with pytest.raises(hf.HessfnError, match="fvp: the criterion is .*check=False"):
        hf.fvp(forward, criterion, params, (X, LABELS))(params)
    hf.fvp(forward, criterion, params, (X, LABELS), check=False)(params)


QUICK: dict[str, Any] = {"k": 1, "num_probes": 200, "num_runs": 1, "num_steps": 3, "num_plane_points": 0}
QUICK |= {"num_activation_probes": 30}


@pytest.mark.slow
def test_a_report_is_of_all_samples(tmp_path: Path) -> None:
    criterion, y = KNOWN["class weights"]
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3)))
    loss, params = hf.functionalize(model, criterion)
    by_weight = lambda batch: CLASS_WEIGHTS[batch[1]].sum()  # noqa: E731
    top = float(torch.linalg.eigvalsh(hf.dense(hf.hvp(loss, params, (X, y)), params))[-1])
    for problem, weights in (
        ((model, criterion, halves(X, y)), None),
        ((model, by_class, halves(X, y)), by_weight),
        ((model, by_class, halves(X, y), by_weight), None),
    ):
        found = hf.report(problem, tmp_path, weights=weights, **QUICK)
        assert found["loss"] == pytest.approx(float(loss(params, (X, y))), rel=1e-12)
        assert found["eigenvalues"][0] == pytest.approx(top, rel=1e-3)
        layer = found["activations"]["0"]
        trace = hf.dense(hf.hvp(loss, params, (X, y)), params)[:12, :12].trace()
        assert layer["weight_stderr"] == 0  # a linear net: it is exact
        assert layer["weight_trace"] == pytest.approx(float(trace), rel=1e-12)
    with pytest.raises(hf.HessfnError, match="no mean over samples"):
        hf.report((model, by_class, halves(X, y)), tmp_path, **QUICK)


# Processes that do not share one problem


def unlike(rank: int, size: int, folder: Path) -> None:
    model = net()
    criterion = nn.CrossEntropyLoss()
    batches = [(X[i : i + 6], LABELS[i : i + 6]) for i in range(0, 24, 6)]
    other = net()
    with torch.no_grad():
        dict(other.named_parameters())["2.weight"][0, 0] += rank
    loss, params = hf.functionalize(model, criterion)

    def product(loss: Any, params: Any, batches: Any, **options: Any) -> Any:
        return hf.mean_hvp(loss, params, ShardedBatches(batches, **options))(hf.gaussian(params, 1)[0])

    right = product(loss, params, batches)
    whole = hf.hvp(loss, params, (X, LABELS))(hf.gaussian(params, 1)[0])
    assert tree.norm(tree.add(right, whole, -1.0)) < 1e-12 * tree.norm(whole)

    last = f"rank {size - 1 if size == 2 else 1} has"
    moved = hf.functionalize(other, criterion)
    assert f"{last} another tensor '2.weight'" in raised(lambda: product(*moved, batches))
    part = hf.functionalize(other, criterion, params="0.*")
    assert f"{last} another tensor '2.weight'" in raised(lambda: product(*part, batches))
    assert f"{last} the batches of rank 0 in another order" in raised(
        lambda: product(loss, params, batches if rank == 0 else batches[::-1])
    )
    assert f"{last} 3 batches, where rank 0 has 4" in raised(
        lambda: product(loss, params, batches if rank == 0 else batches[:-1])
    )
    mine = [*batches[:2], (batches[2][0] + rank, batches[2][1]), batches[3]]
    assert f"{last} another batch 2" in raised(lambda: product(loss, params, mine))
    assert "another tensor '2.weight'" in raised(
        lambda: hf.sensitivities(other, criterion, ShardedBatches(batches), num_probes=1)
    )
    assert "another batch 2" in raised(lambda: hf.activation_traces(model, criterion, ShardedBatches(mine), "0", 1))
    product(loss, params, mine, check=False)

    def broken() -> Any:
        raise RuntimeError("no such file")

    class Broken(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return broken() if rank == 1 else super().__iter__()

    assert "no such file" in raised(lambda: product(loss, params, Broken(batches)))
    dist.barrier()


@needs_processes
def test_processes_that_do_not_share_one_problem_are_told(tmp_path: Path) -> None:
    run(unlike, 2, tmp_path)
