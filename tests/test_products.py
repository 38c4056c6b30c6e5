from types import SimpleNamespace

import pytest
import torch
from nets import CRITERIA, NETS, classes, dense_hessian, needs_compiler, normal, problem, seeded
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from hessfn.core import tree
from hessfn.core.probes import gaussian
from hessfn.losses.functional import functionalize, stateless
from hessfn.products.fisher import fvp
from hessfn.products.gauss_newton import ggnvp
from hessfn.products.hessian import hvp, linearized_hvp, mean_hvp
from hessfn.products.ladder import find_mode
from hessfn.products.loss_checks import check_loss
from hessfn.transforms.conversion import dense
from hessfn.transforms.matvec_check import check_matvec


def close(a, b, rtol=1e-10):
    a, b = tree.ravel(a)[0], tree.ravel(b)[0]
    assert torch.linalg.vector_norm(a - b) <= rtol * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("net", NETS)
def test_product_is_the_dense_hessian_times_the_vector(net, criterion):
    loss, params, batch, _ = problem(net, criterion)
    hessian = dense_hessian(loss, params, batch)
    matvec = hvp(loss, params, batch)
    v = gaussian(params, 1, seed=5)[0]
    flat, unravel = tree.ravel(v)
    close(matvec(v), unravel(hessian @ flat))
    check_matvec(matvec, params, rtol=1e-10)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("net", NETS)
def test_linearized_product_is_the_same(net, criterion):
    loss, params, batch, _ = problem(net, criterion)
    matvec = linearized_hvp(loss, params, batch)
    v = gaussian(params, 3, seed=5)
    close(matvec(v[0]), hvp(loss, params, batch)(v[0]), 1e-12)
    stack = tree.map(lambda *leaves: torch.stack(leaves), *v)
    close(tree.map(lambda x: x[2], torch.func.vmap(matvec)(stack)), matvec(v[2]), 1e-12)


@needs_compiler
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch 2.11 to 2.13, of its compiler's own calls
def test_linearized_product_compiled_by_the_library_is_the_same():
    loss, params, batch, _ = problem("layer_norm")
    v = gaussian(params, 1)[0]
    close(linearized_hvp(loss, params, batch, compile=True)(v), hvp(loss, params, batch)(v), 1e-12)


def test_linearized_product_is_of_the_moment():
    loss, params, batch, model = problem("batch_norm")
    matvec, v = linearized_hvp(loss, params, batch), gaussian(params, 1)[0]
    before = matvec(v)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    close(matvec(v), before, 1e-14)


@pytest.mark.parametrize("net", NETS)
def test_nothing_of_the_users_changes(net):
    loss, params, batch, model = problem(net)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: (x.clone(), x._version, x.data_ptr()) for name, x in model.state_dict().items()}
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    dense(hvp(loss, params, batch), params)
    linearized_hvp(loss, params, batch)(params)
    after = {name: (x, x._version, x.data_ptr()) for name, x in model.state_dict().items()}
    assert all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(before.values(), after.values(), strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert not calls, "hooks put on the user's module later are the user's"


def test_a_loss_that_fails_leaves_the_model_as_it_was():
    model = seeded(lambda: nn.Linear(4, 3))
    loss, params = functionalize(model, lambda outputs, targets: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hvp(loss, params, (normal(2, 4), None))(params)
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * 2


def test_training_mode_batch_norm_differentiates_the_batch_statistics():
    model = seeded(NETS["batch_norm"][0]).train()
    buffers = [b.clone() for b in model.buffers()]
    loss, params = functionalize(model, nn.CrossEntropyLoss())
    batch = (normal(5, 1, 5, 5), classes(5, 3))
    hessian = dense_hessian(loss, params, batch)
    close(dense(hvp(loss, params, batch), params), hessian)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


@pytest.mark.parametrize("net", ["mlp", "layer_norm", "batch_norm", "attention"])
def test_vmap_over_batches_and_over_models_is_the_loop(net):
    problems = [problem(net, seed=s) for s in range(3)]
    loss = problems[0][0]
    params = tree.map(lambda *ps: torch.stack(ps), *[p for _, p, _, _ in problems])
    batch = problems[0][2]
    batches = (torch.stack([batch[0] * c for c in (1, 2, 3)]), torch.stack([batch[1]] * 3))
    v = gaussian(problems[0][1], 1)[0]

    def product(p, b):
        return hvp(loss, p, b)(v)

    together = torch.func.vmap(product)(params, batches)
    for i in range(3):
        one = tree.map(lambda x: x[i], (params, batches))  # noqa: B023
        close(tree.map(lambda x: x[i], together), product(*one))  # noqa: B023


def test_what_has_no_forward_rule_falls_back_with_a_warning_that_names_it():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            return 2 * ctx.saved_tensors[0] * g

    def loss(w):
        return Square.apply(torch.sin(w)).sum()

    w = normal(5)
    matvec = hvp(loss, w, trace_after=0)
    with pytest.warns(UserWarning, match="mode 'reverse', which is exact .*autograd.Function.*forward: .*jvp"):
        matvec(w)
    again = hvp(lambda w: loss(w), w)
    with pytest.warns(UserWarning, match="mode 'reverse'"):  # once it is known that there is no trace
        close(torch.stack([again(w) for _ in range(5)]), matvec(w).expand(5, 5))
    close(dense(matvec, w), dense_hessian(loss, w))


@pytest.mark.parametrize("mode", ["traced", "forward", "reverse", "double_backward", "difference"])
def test_every_mode_is_right_about_weight_norm(mode):
    model = seeded(lambda: nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)))
    loss, params = functionalize(model, nn.CrossEntropyLoss())
    batch, v = (normal(6, 4), classes(6, 3)), gaussian(params, 1)[0]
    h = 1e-5
    above, below = (torch.func.grad(loss)(tree.add(params, v, c), batch) for c in (h, -h))
    close(hvp(loss, params, batch, mode=mode)(v), tree.scale(1 / (2 * h), tree.add(above, below, -1.0)), 1e-7)


@pytest.mark.parametrize("mode", ["traced", "forward", "reverse", "double_backward", "difference"])
def test_every_mode_gives_the_same_product(mode):
    loss, params, batch, _ = problem("layer_norm")
    v = gaussian(params, 1)[0]
    close(hvp(loss, params, batch, mode=mode)(v), hvp(loss, params, batch)(v), 1e-8 if mode == "difference" else 1e-12)


def test_ragged_batches_are_weighed_by_their_size():
    loss, params, (x, y), _ = problem("mlp")
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    hessian = dense_hessian(loss, params, (x, y))
    close(dense(mean_hvp(loss, params, batches), params), hessian)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    rng = torch.get_rng_state()
    close(dense(mean_hvp(loss, params, loader), params), hessian)
    assert torch.equal(rng, torch.get_rng_state())


def test_weights_may_be_numbers_or_a_function_of_the_batch():
    loss, params, (x, y), _ = problem("mlp")
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    blocks = [dense_hessian(loss, params, batch) for batch in batches]
    wanted = (blocks[0] + 3 * blocks[1]) / 4
    close(dense(mean_hvp(loss, params, batches, weights=[1, 3]), params), wanted)
    close(dense(mean_hvp(loss, params, batches, weights=lambda b: {4: 1.0, 2: 3.0}[len(b[0])]), params), wanted)


@pytest.mark.parametrize("net", ["mlp", "batch_norm", "attention", "lstm"])
def test_gauss_newton_is_dense_and_positive_semidefinite(net):
    _, params, (x, y), model = problem(net)
    forward, _ = stateless(model)
    flat, unravel = tree.ravel(params)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = forward(params, x)
        jacobian = torch.autograd.functional.jacobian(lambda p: forward(unravel(p), x).flatten(), flat)
    criterion = nn.CrossEntropyLoss()
    inner = torch.autograd.functional.hessian(lambda o: criterion(o.view_as(outputs), y), outputs.flatten())
    matrix = dense(ggnvp(forward, criterion, params, (x, y)), params)
    close(matrix, jacobian.T @ inner @ jacobian)
    assert torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0] >= -1e-10 * matrix.norm()


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
def test_gauss_newton_of_a_linear_model_is_the_hessian(criterion):
    function, targets = CRITERIA[criterion]
    model = seeded(lambda: nn.Linear(4, 3))
    forward, params = stateless(model)
    loss, _ = functionalize(model, function)
    batch = (normal(6, 4), targets(6))
    close(dense(ggnvp(forward, function, params, batch), params), dense_hessian(loss, params, batch))


@pytest.mark.parametrize("net", ["mlp", "batch_norm", "attention"])
def test_fisher_is_the_mean_outer_product_of_the_samples_gradients(net):
    loss, params, (x, y), model = problem(net)
    forward, _ = stateless(model)
    rows = [tree.ravel(torch.func.grad(loss)(params, (x[i : i + 1], y[i : i + 1])))[0] for i in range(len(x))]
    gradients = torch.stack(rows)
    matrix = dense(fvp(forward, nn.CrossEntropyLoss(), params, (x, y)), params)
    close(matrix, gradients.T @ gradients / len(x))


@pytest.mark.parametrize("make", [ggnvp, fvp])
def test_products_of_jacobians_are_symmetric_where_an_embedding_has_padding(make):
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)))
    forward, params = stateless(model)
    words = torch.tensor([[0, 2, 1], [2, 3, 4]])
    matrix = dense(make(forward, nn.CrossEntropyLoss(), params, (words, classes(2, 3))), params)
    close(matrix, matrix.T)


@pytest.mark.parametrize("make", [ggnvp, fvp])
def test_products_of_jacobians_can_be_differentiated_through_a_layer_norm(make):
    _, params, batch, model = problem("layer_norm")
    forward, _ = stateless(model)
    v, direction = gaussian(params, 2)

    def curvature(p):
        return tree.dot(v, make(forward, nn.CrossEntropyLoss(), p, batch)(v))

    h = 1e-5
    above, below = (curvature(tree.add(params, direction, c)) for c in (h, -h))
    slope = tree.dot(torch.func.grad(curvature)(params), direction)
    assert torch.allclose(slope, (above - below) / (2 * h), rtol=1e-5)


class Shuffled:
    """Batches in another order each time, as a careless data set gives them."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        self.batches = self.batches[::-1]
        return iter(self.batches)


def test_bad_input_is_named():
    loss, params, (x, y), _ = problem("mlp")
    v = gaussian(params, 1)[0]
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    with pytest.raises(ValueError, match="only once"):
        mean_hvp(loss, params, iter(batches))
    with pytest.raises(ValueError, match="there is no batch"):
        mean_hvp(loss, params, [])
    with pytest.raises(ValueError, match="shuffle=False"):
        mean_hvp(loss, params, DataLoader(TensorDataset(x, y), shuffle=True))
    careless = mean_hvp(loss, params, Shuffled(batches))
    careless(v)
    with pytest.raises(ValueError, match="shuffle=False"):
        careless(v)
    with pytest.raises(ValueError, match="weights has 1 entries"):
        mean_hvp(loss, params, batches, weights=[1.0])(v)
    with pytest.raises(ValueError, match="one real number"):
        hvp(lambda p: p["0.weight"], params)(v)
    with pytest.raises(ValueError, match="batch 1: the loss is nan"):
        mean_hvp(loss, params, [batches[0], (batches[1][0] * torch.nan, batches[1][1])])(v)
    with pytest.raises(ValueError, match="random numbers"):
        hvp(lambda p: nn.functional.dropout(p["0.weight"]).sum(), params)(v)
    with pytest.raises(ValueError, match=r"missing \['2.bias'\]"):
        hvp(loss, params, (x, y))({k: t for k, t in v.items() if k != "2.bias"})
    with pytest.raises(ValueError, match="'0.bias' of the vector has shape"):
        hvp(loss, params, (x, y))({**v, "0.bias": torch.zeros(3, dtype=torch.float64)})
    with pytest.raises(ValueError, match="mode='fast'"):
        hvp(loss, params, (x, y), mode="fast")


def test_a_vector_in_another_order_of_keys_is_the_same_vector():
    loss, params, batch, _ = problem("mlp")
    v = gaussian(params, 1)[0]
    matvec = hvp(loss, params, batch)
    close(matvec(dict(reversed(v.items()))), matvec(v))


def test_the_way_taken_can_be_asked_for():
    loss, params, batch, _ = problem("mlp")
    assert find_mode(loss, params, batch) == ("traced", "", 0.0)


@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_microbatches_change_nothing(microbatch):
    loss, params, (x, y), _ = problem("batch_norm")
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    matvec = mean_hvp(loss, params, batches, microbatch=microbatch)
    v = gaussian(params, 1)[0]
    close(matvec(v), mean_hvp(loss, params, batches)(v))
    by_count = mean_hvp(loss, params, batches, microbatch=microbatch, weights=lambda b: len(b[0]))
    close(by_count(v), matvec(v))
    given = mean_hvp(loss, params, batches, microbatch=microbatch, weights=[3.0, 1.0])
    close(given(v), mean_hvp(loss, params, batches, weights=[3.0, 1.0])(v))


def test_a_loss_that_draws_from_the_generator_of_its_device_is_refused(monkeypatch):
    state = [torch.zeros(1)]

    def draw(w):
        state[0] = state[0] + 1
        return w.sum()

    accelerator = SimpleNamespace(
        get_rng_state=lambda device: state[0], set_rng_state=lambda new, device: state.__setitem__(0, new)
    )
    monkeypatch.setattr(torch, "meta", accelerator, raising=False)
    with pytest.raises(ValueError, match="draws random numbers"):
        check_loss(draw, torch.ones(2, device="meta"), ())
    assert state[0] == 0
