import time

import numpy
import pytest
import scipy.sparse.linalg
import torch
from nets import dense_hessian, normal, problem
from torch import nn

from hessfn.core import tree
from hessfn.core.probes import gaussian
from hessfn.losses.functional import functionalize
from hessfn.products.hessian import hvp, linearized_hvp, mean_hvp
from hessfn.transforms.blocks import restrict
from hessfn.transforms.conversion import as_linear_operator, dense
from hessfn.transforms.deflation import deflate
from hessfn.transforms.matvec_check import check_matvec
from hessfn.transforms.progress_bar import progress


def symmetric(n, seed=0):
    a = normal(n, n, seed=seed)
    return a + a.T


def in_tree(matrix):
    like = {"a": torch.zeros(2, 3).double(), "b": [torch.zeros(4).double()]}
    unravel = tree.ravel(like)[1]
    return (lambda v: unravel(matrix @ tree.ravel(v)[0])), like


def test_dense_gives_the_matrix_back():
    matrix = symmetric(10)
    assert torch.equal(dense(*in_tree(matrix)), matrix)


def test_restrict_is_a_diagonal_block():
    matrix = symmetric(10)
    matvec, like = in_tree(matrix)
    block = tree.select(like, "b.*")
    assert torch.equal(dense(restrict(matvec, like, "b.*"), block), matrix[6:, 6:])


def test_restrict_of_a_net_is_the_hessian_by_those_parameters():
    loss, params, batch, model = problem("mlp")
    last = {name: params[name] for name in ("2.weight", "2.bias")}
    block = dense(restrict(hvp(loss, params, batch), params, "2.*"), last)
    few, chosen = functionalize(model, nn.CrossEntropyLoss(), params="2.*")
    assert torch.allclose(block, dense(hvp(few, chosen, batch), chosen), rtol=1e-12)


def test_deflate_projects_from_both_sides_whatever_the_lengths():
    matrix = symmetric(10)
    matvec, like = in_tree(matrix)
    rows = normal(3, 10, seed=4)
    vectors = tree.ravel(like)[1](rows)
    q = torch.linalg.qr(rows.T).Q
    outside = torch.eye(10).double() - q @ q.T
    assert torch.allclose(dense(deflate(matvec, vectors), like), outside @ matrix @ outside, atol=1e-12)


def test_progress_counts_products_and_changes_nothing(capsys):
    matvec, like = in_tree(symmetric(10))
    v = gaussian(like, 1)[0]
    counted = progress(matvec, total=2, desc="eigenvalues")
    assert torch.equal(counted(v)["a"], matvec(v)["a"]) and torch.equal(counted(v)["a"], matvec(v)["a"])
    assert "eigenvalues: 100%" in capsys.readouterr().err


def test_scipy_finds_the_eigenvalues_of_a_net():
    loss, params, batch, _ = problem("layer_norm")
    operator = as_linear_operator(hvp(loss, params, batch), params)
    values = scipy.sparse.linalg.eigsh(operator, k=3, v0=numpy.ones(operator.shape[0]))[0]
    exact = numpy.linalg.eigvalsh(dense_hessian(loss, params, batch).numpy())
    largest = exact[numpy.argsort(abs(exact))[-3:]]
    assert numpy.allclose(sorted(values), sorted(largest), rtol=1e-10)


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            scale = self.first(x).square().mean()
        return self.second(torch.tanh(self.first(x))) * scale


def test_check_matvec_says_which_property_fails():
    matvec, like = in_tree(symmetric(10))
    check_matvec(matvec, like)
    ticks = iter(range(100))
    with pytest.raises(ValueError, match="not deterministic.*dropout.*loader"):
        check_matvec(lambda v: tree.scale(1 + next(ticks), matvec(v)), like)
    with pytest.raises(ValueError, match="not linear"):
        check_matvec(lambda v: tree.map(torch.abs, v), like)
    with pytest.raises(ValueError, match="not symmetric"):
        check_matvec(in_tree(normal(10, 10))[0], like)
    with pytest.raises(ValueError, match="not finite"):
        check_matvec(lambda v: tree.scale(float("nan"), v), like)


def test_check_matvec_catches_a_no_grad_block():
    torch.manual_seed(0)
    loss, params = functionalize(NoGrad().double(), nn.CrossEntropyLoss())
    batch = (normal(6, 4), torch.arange(6) % 3)
    with pytest.raises(ValueError, match="not symmetric.*no_grad"):
        check_matvec(hvp(loss, params, batch, mode="forward", check=False), params)
    with pytest.warns(UserWarning, match="mode"):  # another one, which is right
        check_matvec(hvp(loss, params, batch), params)


def test_check_matvec_catches_dropout_and_shuffling():
    weight = normal(3, 4)
    batch = (normal(6, 4), torch.arange(6) % 3)

    def dropping(w, batch):
        return nn.functional.cross_entropy(nn.functional.dropout(batch[0], 0.5) @ w.T, batch[1])

    def careless(v):  # a product of somebody else's, with nothing of hessfn in it
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(dropping(leaf, batch), leaf, create_graph=True)
        return torch.autograd.grad(gradient, leaf, v)[0]

    with torch.random.fork_rng(devices=[]), pytest.raises(ValueError, match="not deterministic.*dropout"):
        check_matvec(careless, weight)
    with pytest.raises(ValueError, match="draws random numbers.*eval"):
        check_matvec(hvp(dropping, weight, batch), weight)
    order = iter(range(100))

    class Shuffling:
        def __iter__(self):
            batches = [tuple(x[i : i + 2] for x in batch) for i in (0, 2, 4)]
            return iter(batches[next(order) % 3 :] + batches[: next(order) % 3])

    def loss(w, batch):
        return nn.functional.cross_entropy(batch[0] @ w.T, batch[1])

    with pytest.raises(ValueError, match="batches of this pass.*shuffle=False"):
        check_matvec(mean_hvp(loss, weight, Shuffling()), weight)


def test_a_check_costs_four_products():
    calls = []
    matvec, like = in_tree(symmetric(10))
    check_matvec(lambda v: (calls.append(time.time()), matvec(v))[1], like)
    assert len(calls) == 4


@pytest.mark.parametrize("net", ["mlp", "layer_norm", "attention"])
def test_dense_is_the_same_for_columns_at_once(net):
    loss, params, batch, _ = problem(net)
    exact = dense_hessian(loss, params, batch)
    for make in (hvp, linearized_hvp):
        matvec = make(loss, params, batch)
        for size in (16, len(exact) - 1, len(exact), 1000):
            assert torch.allclose(dense(matvec, params, batch_size=size), exact, rtol=1e-12, atol=1e-14)


def test_dense_takes_one_call_for_a_group_of_columns():
    matvec, like = in_tree(symmetric(10))
    calls = []
    assert torch.equal(dense(lambda v: (calls.append(0), matvec(v))[1], like, batch_size=4), dense(matvec, like))
    assert len(calls) == 3
    block = dense(restrict(matvec, like, "a"), {"a": like["a"]}, batch_size=6)
    assert torch.equal(block, symmetric(10)[:6, :6])


def test_dense_of_groups_can_be_differentiated():
    matrix = symmetric(4).requires_grad_()
    (gradient,) = torch.autograd.grad(dense(lambda v: matrix @ v, torch.zeros(4).double(), batch_size=3)[1, 2], matrix)
    assert torch.equal(gradient, torch.eye(4).double()[1][:, None] * torch.eye(4).double()[2])


@pytest.mark.parametrize(
    "matvec",
    [
        lambda v: v * float(v.sum()),
        lambda v: v if v.sum() > 0 else -v,
        lambda v: torch.from_numpy(v.numpy() * 2),
        lambda v: v * len(v.nonzero()),
    ],
    ids=["item", "branch", "numpy", "shape"],
)
def test_dense_of_groups_says_what_vmap_cannot(matvec):
    like = torch.zeros(3).double()
    dense(matvec, like)
    with pytest.raises(
        ValueError, match=r"dense\(batch_size=2\): the matvec cannot be put under vmap.*leave batch_size out"
    ):
        dense(matvec, like, batch_size=2)


def test_dense_of_groups_keeps_the_other_errors():
    with pytest.raises(ValueError, match="not finite"):
        dense(lambda v: v * float("nan"), torch.zeros(4), batch_size=2)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        dense(lambda v: v, torch.zeros(4), batch_size=0)
    with pytest.raises(ValueError, match="the product has shape"):
        dense(lambda v: v[:2], torch.zeros(4), batch_size=2)
