"""The cleaned graph is the loss: same values, same first and second derivatives, on every kind of layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from graphs import linearized, loss_graph
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.engine.pipeline import clean

B = 3


def seeded(*shape):
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def classes(*shape, high=4):
    return torch.arange(math.prod(shape)).reshape(shape) % high


def problem(model, x, criterion=lambda out: out.square().mean(), train=False):
    model = model.double().train(train)
    params = {name: seeded(*p.shape) / 2 for name, p in model.named_parameters()}
    buffers = {name: b.detach() for name, b in model.named_buffers()}

    def loss(params, x):
        state = {**{name: b.clone() for name, b in buffers.items()}, **params}
        return criterion(functional_call(model, state, x if isinstance(x, tuple) else (x,)))

    return loss, params, x


POSITIVE, REAL, SIGNS = seeded(B, 4).abs(), seeded(B, 4), seeded(B, 4).sign()
UNIT = (SIGNS + 1) / 2


def mlp(criterion, out=4):
    return lambda: problem(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, out)), seeded(B, 3), criterion)


def conv_net(*norms, act=nn.Tanh, groups=1):
    def make():
        first, second = (norm(4) for norm in norms)
        for module in (first, second):
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(seeded(*buffer.shape).abs() + 0.5)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False), first, act(), nn.Conv2d(4, 4, 3, groups=groups), second, act(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
        )  # fmt: skip
        return problem(net, seeded(B, 2, 6, 6), lambda out: F.cross_entropy(out, classes(B)))

    return make


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class First(nn.Module):
    def __init__(self, module, copies=1):
        super().__init__()
        self.module, self.copies = module, copies

    def forward(self, x):
        return self.module(*[x] * self.copies)[0]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head, self.unused = nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(2, 2)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x).tanh())


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x):
        out = self.inner(x)
        out[:, :2] *= 2
        out[0].add_(1).sin_()
        return F.silu(out, inplace=True)


class Detached(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.inner, self.cut = nn.Linear(3, 4), cut

    def forward(self, x):
        out = self.inner(x)
        return out.tanh() * self.cut(out).exp()


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, activation="gelu")


EXACT = {
    "mse": mlp(lambda out: F.mse_loss(out, REAL)),
    "mse sum": mlp(lambda out: F.mse_loss(out, REAL, reduction="sum")),
    "huber": mlp(lambda out: F.huber_loss(out, REAL, delta=0.3)),
    "smooth l1": mlp(lambda out: F.smooth_l1_loss(out, REAL, beta=0.3)),
    "soft margin": mlp(lambda out: F.soft_margin_loss(out, SIGNS)),
    "bce": mlp(lambda out: F.binary_cross_entropy(out.sigmoid(), UNIT)),
    "bce with logits": mlp(lambda out: F.binary_cross_entropy_with_logits(out, UNIT)),
    "cross entropy": mlp(lambda out: F.cross_entropy(out, classes(B), label_smoothing=0.1)),
    "ignored targets": mlp(lambda out: F.cross_entropy(out, torch.tensor([0, -100, 2]))),
    "nll": mlp(lambda out: F.nll_loss(out.log_softmax(1), classes(B), weight=POSITIVE[0])),
    "kl": mlp(lambda out: F.kl_div(out.log_softmax(1), REAL.softmax(1), reduction="batchmean")),
    "kl log target": mlp(
        lambda out: F.kl_div(out.log_softmax(1), REAL.log_softmax(1), log_target=True, reduction="batchmean")
    ),
    "poisson": mlp(lambda out: F.poisson_nll_loss(out, POSITIVE)),
    "cosine": mlp(lambda out: F.cosine_embedding_loss(out, REAL, torch.tensor([1, -1, 1]))),
    "multilabel margin": mlp(lambda out: F.multilabel_soft_margin_loss(out, UNIT)),
    "triplet": mlp(lambda out: F.triplet_margin_loss(out, REAL, REAL.flip(0))),
    "layer norm": lambda: problem(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), seeded(B, 3)),
    "rms norm": lambda: problem(nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4), nn.Linear(4, 2)), seeded(B, 3)),
    "group norm": conv_net(lambda c: nn.GroupNorm(2, c), lambda c: nn.InstanceNorm2d(c, affine=True)),
    "batch norm": conv_net(nn.BatchNorm2d, nn.BatchNorm2d),
    "batch norm without affine": conv_net(lambda c: nn.BatchNorm2d(c, affine=False), nn.BatchNorm2d, groups=2),
    "batch norm alone": lambda: problem(
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), seeded(B, 3)
    ),
    "batch norm, transposed": lambda: problem(
        nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh()), seeded(B, 2, 4, 4)
    ),
    "batch norm, training": lambda: problem(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh()), seeded(B, 2, 4, 4), train=True
    ),
    "conv1d": lambda: problem(nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Tanh()), seeded(B, 2, 6)),
    "conv3d": lambda: problem(nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Tanh()), seeded(B, 2, 3, 3, 3)),
    "in-place relu": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=lambda: nn.ReLU(inplace=True)),
    "relu6": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=lambda: nn.ReLU6(inplace=True)),
    "leaky relu": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=lambda: nn.LeakyReLU(inplace=True)),
    "silu": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=lambda: nn.SiLU(inplace=True)),
    "gelu, elu": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=lambda: nn.Sequential(nn.GELU("tanh"), nn.ELU())),
    "softplus, mish": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=lambda: nn.Sequential(nn.Softplus(), nn.Mish())),
    "prelu": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=nn.PReLU),
    "pools": lambda: problem(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2, 1), nn.Tanh(), nn.AdaptiveAvgPool2d(1)), seeded(B, 2, 6, 6)
    ),
    "upsample": lambda: problem(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh()), seeded(B, 2, 4, 4)
    ),
    "attention": lambda: problem(Attention(), seeded(B, 5, 4)),
    "multihead attention": lambda: problem(First(nn.MultiheadAttention(4, 2, batch_first=True), 3), seeded(B, 5, 4)),
    "transformer": lambda: problem(encoder(), seeded(B, 5, 4)),
    "transformer, training": lambda: problem(encoder(), seeded(B, 5, 4), train=True),
    "lstm": lambda: problem(First(nn.LSTM(2, 3, num_layers=2, bidirectional=True, batch_first=True)), seeded(B, 4, 2)),
    "gru": lambda: problem(First(nn.GRU(2, 3)), seeded(4, B, 2)),
    "rnn": lambda: problem(First(nn.RNN(2, 3)), seeded(4, B, 2)),
    "spectral norm": lambda: problem(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)).eval(), seeded(B, 3)),
    "embedding": lambda: problem(nn.Sequential(nn.Embedding(5, 3), nn.Tanh()), classes(B, 2)),
    "tied and unused": lambda: problem(Tied(), classes(B, 2), lambda out: out.logsumexp(-1).mean()),
    "checkpoint": lambda: (
        lambda p, x: checkpoint(lambda w, x: (x @ w).tanh(), p["w"], x, use_reentrant=False).square().mean(),
        {"w": seeded(3, 4)},
        seeded(B, 3),
    ),
    "indexing": lambda: (
        lambda p, x: (p["w"][torch.tensor([2, 0, 2])] * p["w"][torch.tensor([True, False, True])].sum(0)).sin().sum(),
        {"w": seeded(3, 3)},
        seeded(3),
    ),
    "in-place": lambda: problem(InPlace(), seeded(B, 3)),
    "dropout, eval": lambda: problem(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh()), seeded(B, 3)),
}
# Double backward does not exist, or is wrong (weight norm).
BY_DIFFERENCES = {
    "multi margin": mlp(lambda out: F.multi_margin_loss(out, classes(B), p=2)),
    "weight norm": lambda: problem(
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), seeded(B, 3), lambda out: out.logsumexp(1).mean()
    ),
    "hardswish": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=nn.Hardswish),
    "hardsigmoid": conv_net(nn.BatchNorm2d, nn.BatchNorm2d, act=nn.Hardsigmoid),
}  # fmt: skip


def gradient(loss, params, x):
    return grad(loss)(params, x)


def product(loss, params, x, v):
    return jvp(lambda p: grad(loss)(p, x), (params,), (v,))[1]


def double_backward(loss, params, x, v):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(
            loss(leaves, x), list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        inner = sum((g * v[name]).sum() for name, g in zip(leaves, first, strict=True))
        second = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, second, strict=True))


def difference(loss, params, x, v):
    def central(h):
        ends = [autograd_gradient(loss, tree.add(params, v, s), x) for s in (h, -h)]
        return tree.scale(1 / (2 * h), tree.add(*ends, -1.0))

    return tree.add(tree.scale(4 / 3, central(5e-4)), central(1e-3), -1 / 3)


def autograd_gradient(loss, params, x):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    grads = torch.autograd.grad(loss(leaves, x), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def off(a, b):
    return float((tree.norm(tree.add(a, b, -1.0)) / tree.norm(b)).detach())


def direction(params):
    return {name: seeded(*p.shape).flip(0) for name, p in params.items()}


@pytest.mark.parametrize("case", EXACT)
def test_graph_has_the_derivatives_of_the_loss(case):
    loss, params, x = EXACT[case]()
    v = direction(params)
    graph = clean(loss, params, x)
    assert torch.allclose(graph(params, x), loss(params, x), rtol=1e-12)
    assert off(gradient(graph, params, x), autograd_gradient(loss, params, x)) < 1e-11
    expected = double_backward(loss, params, x, v)
    assert off(product(graph, params, x, v), expected) < 1e-10
    assert off(linearized(loss, params, x)(v), expected) < 1e-10


@pytest.mark.parametrize("case", BY_DIFFERENCES)
def test_graph_has_second_derivatives_where_autograd_has_no_right_ones(case):
    loss, params, x = BY_DIFFERENCES[case]()
    v = direction(params)
    graph = clean(loss, params, x)
    assert (
        off(gradient(graph, params, x), autograd_gradient(loss, params, x)) < 1e-7
    )  # torch's sixth in hardsigmoid is a float32
    expected = difference(loss, params, x, v)
    assert off(product(graph, params, x, v), expected) < 1e-7
    assert off(linearized(loss, params, x)(v), expected) < 1e-7


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


class StraightOfOldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def without_grad(w, mode):
    with mode():
        scale = w * 2
    return (scale * w).sum()


REFUSED = {
    "branch": (lambda w, x: w.sum() if w.sum() > 0 else -w.sum(), "branches"),
    "item": (lambda w, x: w.sum() * w.max().item(), "value"),
    "numpy": (lambda w, x: w.sum() * float(w.detach().numpy()[0]), "value"),
    "mask": (lambda w, x: w[w > 0].mean(), "shape"),
    "mask of an argument": (lambda w, x: w[x > 0].mean(), "shape"),
    "count": (lambda w, x: w.sum() * len(w.nonzero()), "shape"),
    "no_grad": (lambda w, x: without_grad(w, torch.no_grad), "derivatives are off"),
    "inference mode": (lambda w, x: without_grad(w, torch.inference_mode), "derivatives are off"),
    "dropout": (lambda w, x: F.dropout(w).square().sum(), "random"),
    "custom function": (lambda w, x: Straight.apply(w).square().sum(), "autograd.Function"),
    "custom function of old style": (lambda w, x: StraightOfOldStyle.apply(w).square().sum(), "autograd.Function"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_would_lose_is_refused(case):
    loss, why = REFUSED[case]
    with pytest.raises(Untraceable, match=why):
        clean(loss, seeded(4), seeded(4))


@pytest.mark.parametrize("cut", [torch.Tensor.detach, torch.detach, lambda x: x.data, lambda x: x.detach().clone()])
def test_what_is_detached_stays_constant(cut):
    x = seeded(4)
    fixed = clean(lambda w, c: (w * c.exp()).sin().sum(), x, x)
    graph, v = clean(lambda w: (w * cut(w).exp()).sin().sum(), x), seeded(4).flip(0)
    expected = jvp(lambda w: grad(fixed)(w, x), (x,), (v,))[1]
    assert torch.allclose(jvp(grad(graph), (x,), (v,))[1], expected, rtol=1e-12)
    assert torch.allclose(linearized(lambda w: (w * cut(w).exp()).sin().sum(), x)(v), expected, rtol=1e-12)


def test_a_graph_serves_other_values_of_the_same_shapes():
    loss, params, x = EXACT["batch norm"]()
    graph = clean(loss, params, x)
    others, y = tree.map(torch.cos, params), x.exp()
    assert torch.allclose(graph(others, y), loss(others, y), rtol=1e-12)


def test_batch_norm_in_eval_mode_leaves_no_work_of_the_size_of_the_activations():
    loss, params, x = EXACT["batch norm"]()
    calls = [node for node in loss_graph(loss, params, x).graph.nodes if node.op == "call_function"]
    after_convolutions = {str(user.target) for n in calls if "convolution" in str(n.target) for user in n.users}
    assert after_convolutions == {"aten.tanh.default"}


def test_tracing_leaves_the_random_state_alone_and_a_results_memory_is_its_own():
    before = torch.get_rng_state()
    v = (seeded(3), seeded(3))
    matvec = linearized(lambda p: (p[0] + p[1]).square().sum() / 2, v)
    a, b = matvec(v)
    assert torch.equal(before, torch.get_rng_state())
    assert len({t.data_ptr() for t in (a, b, *v)}) == 4


def test_channels_last_gives_back_the_parameters_layout_and_single_precision_is_near():
    x = seeded(B, 2, 6, 6)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten())
    weights = {name: p.detach() for name, p in net.named_parameters()}
    double = tree.map(lambda p: p.double(), weights)

    def loss(p, x):
        return functional_call(net, p, (x,)).logsumexp(1).mean()

    v = {name: seeded(*p.shape) for name, p in double.items()}
    out = linearized(loss, weights, x.float())(tree.map(lambda p: p.float(), v))
    assert all(o.stride() == p.stride() for o, p in zip(out.values(), weights.values(), strict=True))
    assert off(tree.map(lambda p: p.double(), out), double_backward(loss, double, x, v)) < 1e-5


def test_pooling_to_one_pixel_is_linearized_whatever_the_layout_of_its_image():
    x = seeded(B, 5, 5, 2).permute(0, 3, 1, 2)  # the channels are innermost

    def loss(p, x):
        return F.adaptive_avg_pool2d(p["w"][:, None, None] * x, 1).flatten(1).pow(3).sum()

    p, v = {"w": seeded(2)}, {"w": seeded(2)}
    assert not loss_graph(loss, p, x).graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    assert off(linearized(loss, p, x)(v), double_backward(loss, p, x, v)) < 1e-12


@pytest.mark.parametrize("strides", [(1, 2), (2, 1)])
def test_views_of_other_entries_are_kept(strides):
    def loss(p, x):
        return (p["w"] ** 3)[2:].as_strided((2, 2), strides, 2).mm(p["w"][:4].view(2, 2)).pow(2).sum()

    p, v = {"w": seeded(6)}, {"w": seeded(6)}
    assert off(product(clean(loss, p, None), p, None, v), double_backward(loss, p, None, v)) < 1e-12


ASSIGNMENTS = {
    "zero_": lambda a, w: a[2:4].zero_(),
    "zeros": lambda a, w: a.__setitem__(slice(2, 4), 0.0),
    "of parameters": lambda a, w: a.__setitem__(slice(2, 4), w[:2]),
    "at indices": lambda a, w: a.__setitem__([1, 3], w[:2]),
    "at a mask": lambda a, w: a.__setitem__(a > 0, 0.0),
    "to one number": lambda a, w: a[2:4].fill_(w[0]),
    "to all": lambda a, w: a.view(2, 3).fill_(1.5),
    "on a diagonal": lambda a, w: a.view(2, 3).diagonal().mul_(w[:2]),
}


@pytest.mark.parametrize("assign", ASSIGNMENTS.values(), ids=list(ASSIGNMENTS))
def test_losses_that_assign_are_linearized(assign):
    def loss(p, x):
        a = p["a"].clone()
        assign(a, p["w"])
        return (a * p["w"] + p["a"]).pow(3).sum()

    p, v = {"a": seeded(6), "w": seeded(6) + 1}, {"a": seeded(6), "w": seeded(6) - 1}
    assert off(linearized(loss, p, None)(v), double_backward(loss, p, None, v)) < 1e-12


def test_filters_of_frequencies_are_linearized():
    def loss(p, x):
        return torch.fft.irfft2(torch.fft.rfft2(p["a"]) * torch.complex(p["re"], p["im"])).pow(3).sum()

    p, v = ({"a": seeded(4, 8), "re": seeded(4, 5), "im": seeded(4, 5)} for _ in range(2))
    assert off(linearized(loss, p, None)(v), double_backward(loss, p, None, v)) < 1e-12
