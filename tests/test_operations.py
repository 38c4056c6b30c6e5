"""Every kind of net and loss, one row each: its product is right, and made in the way that the documentation says."""

import copy
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from graphs import by_recorder, by_reference, derivative_graph, linear_graph
from nets import classes, normal, seeded
from torch import fx, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hessfn.core import tree
from hessfn.core.probes import gaussian
from hessfn.engine.memory_plan import shares_memory
from hessfn.engine.op_definitions import by_definition
from hessfn.engine.trace import tensors
from hessfn.losses.functional import functionalize
from hessfn.products.hessian import hvp, linearized_hvp
from hessfn.products.ladder import find_mode


class Row(NamedTuple):
    what: str
    build: Callable[[], nn.Module]
    inputs: Any
    criterion: Callable[[Any, Any], torch.Tensor] = nn.CrossEntropyLoss()
    targets: Any = classes(4, 3)
    way: str = "traced"


def net(*middle: nn.Module, width: int = 5) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, width), *anew(middle), nn.Linear(width, 3))


def image(*middle: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), *anew(middle), nn.Conv2d(4, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


def anew(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    """Copies whose parameters are drawn now: those of the table were drawn, from no seed, when it was written down."""
    copies = [copy.deepcopy(module) for module in modules]
    for module in (m for each in copies for m in each.modules() if hasattr(m, "reset_parameters")):
        module.reset_parameters()
    return copies


class Module(nn.Module):
    """A module from a function of (its layers, inputs)."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class CubeWithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def blocks(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.out(checkpoint(m.block, torch.tanh(m.inp(x)), use_reentrant=False))


def branching(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(m.inp(x))
    for _ in range(3 if hidden.sum() > 0 else 5):
        hidden = torch.tanh(m.block(hidden))
    return m.out(hidden)


def packed(m: Any, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(m.rnn(sequence)[0], batch_first=True)[0].sum(1)


def spectra(m: Any, x: torch.Tensor) -> torch.Tensor:
    wave = m.inp(x).tanh().repeat(1, 4)
    found = torch.stft(wave, 8, window=WINDOW, return_complex=True)
    return m.out(torch.istft(found * found.abs(), 8, window=WINDOW)[:, 4:8])


def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    grid = F.affine_grid(by, [4, 1, 3, 3], align_corners=True)
    return F.grid_sample(x, grid, "bicubic", "reflection", align_corners=True)


def slopes(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    hidden = torch.tanh(m.inp(x))
    (slope,) = torch.autograd.grad(hidden.sin().sum(), x, create_graph=True)
    return m.out(hidden + m.block(slope))


def zero_slice(m: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.tanh(m.inp(x)).clone()
    hidden[:, 1:3].zero_()
    return m.out(hidden * m.block(hidden))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def partly_frozen() -> nn.Module:
    model = net(nn.Tanh())()
    model[0].weight.requires_grad_(False)
    return model


def three(**more: nn.Module) -> dict[str, nn.Module]:
    return {"inp": nn.Linear(4, 4), "block": nn.Linear(4, 4), "out": nn.Linear(4, 3), **more}


SEQUENCE = normal(4, 5, 4)
WORDS = classes(12, 7).view(4, 3)
X = normal(4, 4)
IMAGES = normal(4, 1, 5, 5)
REAL = normal(4, 3, seed=7)
UNIT = torch.sigmoid(REAL)
LENGTHS = torch.tensor([3, 5, 1, 4])
WINDOW = torch.hann_window(8, dtype=torch.float64)

ROWS = [
    # layers
    Row("BatchNorm, eval", image(nn.BatchNorm2d(4)), IMAGES),
    Row("BatchNorm, training", lambda: image(nn.BatchNorm2d(4), nn.Softplus())().train(), IMAGES),
    Row("InstanceNorm", image(nn.InstanceNorm2d(4, affine=True), nn.Softplus()), IMAGES),
    Row("LayerNorm", net(nn.LayerNorm(5), nn.GELU()), X),
    Row("GroupNorm", image(nn.GroupNorm(2, 4), nn.SiLU()), IMAGES),
    Row("RMSNorm", net(nn.RMSNorm(5), nn.SiLU()), X),
    Row("MaxPool, AvgPool", image(nn.MaxPool2d(2, 1, 1), nn.AvgPool2d(2, 1)), IMAGES),
    Row("ConvTranspose", image(nn.ConvTranspose2d(4, 4, 1), nn.Tanh()), IMAGES),
    Row("Embedding", lambda: nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3)), WORDS),
    Row("Embedding with padding_idx", lambda: nn.Sequential(
        nn.Embedding(7, 4, padding_idx=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), WORDS),
    Row("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(7, 4, padding_idx=1), nn.Tanh(), nn.Linear(4, 3)), WORDS),
    Row("EmbeddingBag, sum, weighted", lambda: Module(
        lambda m, x: m.out(m.bag(x, per_sample_weights=x.double().sin())), bag=nn.EmbeddingBag(7, 4, mode="sum"),
        out=nn.Linear(4, 3)), WORDS),
    Row("EmbeddingBag, max", lambda: nn.Sequential(nn.EmbeddingBag(7, 4, mode="max"), nn.Linear(4, 3)), WORDS,
        way="difference"),
    Row("PReLU, ELU, LeakyReLU", net(nn.PReLU(), nn.ELU(), nn.LeakyReLU()), X),
    Row("Hardswish, Hardsigmoid, ReLU6", net(nn.Hardswish(), nn.Hardsigmoid(), nn.ReLU6()), X),
    Row("in-place activations", net(nn.ReLU(inplace=True), nn.Linear(5, 5), nn.ELU(inplace=True)), X),
    Row("Dropout, eval", net(nn.Tanh(), nn.Dropout(0.5)), X),
    Row("MultiheadAttention", lambda: Module(
        lambda m, x: m.out(m.attend(x, x, x, need_weights=False)[0].mean(1)),
        attend=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 3)), SEQUENCE),
    Row("scaled_dot_product_attention", lambda: Module(
        lambda m, x: m.out(F.scaled_dot_product_attention(*m.qkv(x).chunk(3, -1), is_causal=True).mean(1)),
        qkv=nn.Linear(4, 12), out=nn.Linear(4, 3)), SEQUENCE),
    Row("TransformerEncoderLayer", lambda: Module(
        lambda m, x: m.out(m.layer(x).mean(1)),
        layer=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), out=nn.Linear(4, 3)), SEQUENCE),
    Row("RNN", lambda: Module(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.RNN(4, 3)), SEQUENCE),
    Row("LSTM, two layers, both ways", lambda: Module(
        lambda m, x: m.out(m.rnn(x)[0][:, -1]), rnn=nn.LSTM(4, 3, 2, bidirectional=True), out=nn.Linear(6, 3)),
        SEQUENCE),
    Row("GRU", lambda: Module(lambda m, x: m.rnn(x)[0][:, -1], rnn=nn.GRU(4, 3)), SEQUENCE),
    Row("RNN and GRU, batch_first", lambda: Module(
        lambda m, x: m.gru(m.rnn(x)[0])[0][:, -1], rnn=nn.RNN(4, 4, batch_first=True),
        gru=nn.GRU(4, 3, batch_first=True)), SEQUENCE),
    Row("LSTM, packed sequences", lambda: Module(packed, rnn=nn.LSTM(4, 3, batch_first=True)), (SEQUENCE, LENGTHS)),
    Row("weight_norm (parametrization)", lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), X),
    Row("spectral_norm, eval", lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)), X),
    Row("pooling to one pixel", lambda: Module(
        lambda m, x: m.out(F.adaptive_avg_pool2d(m.conv(x).pow(2).to(memory_format=torch.channels_last), 1).flatten(1)),
        conv=nn.Conv2d(1, 4, 3), out=nn.Linear(4, 3)), IMAGES),
    Row("slices set to zero", lambda: Module(zero_slice, **three()), X),
    Row("filters of frequencies", lambda: Module(lambda m, x: m.out(
        torch.fft.irfft(torch.fft.rfft(m.inp(x)) * m.block(x)[:, :3])), **three()), X),
    Row("grid_sample", lambda: Module(
        lambda m, x: m.out(F.grid_sample(x, 0.2 + 0.1 * m.where(x.flatten(1)).tanh().view(4, 3, 3, 2),
                                       align_corners=False).flatten(1)),
        where=nn.Linear(25, 18), out=nn.Linear(9, 3)), IMAGES),
    Row("affine_grid, bicubic samples", lambda: Module(
        lambda m, x: m.out(turned(x, m.where(x.flatten(1)).tanh().view(4, 2, 3)).flatten(1)),
        where=nn.Linear(25, 6), out=nn.Linear(9, 3)), IMAGES),
    Row("circular padding", lambda: nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Flatten(), nn.Linear(50, 3)), IMAGES),
    Row("cdist and pdist", lambda: Module(
        lambda m, x: torch.cdist(m.inp(x), m.out.weight) + F.pdist(m.block(x))[:3] ** 2, **three()), X),
    Row("RReLU, eval", net(nn.RReLU()), X),
    Row("stft and istft", lambda: Module(spectra, **three()), X),
    Row("orthogonal (parametrization)", lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh(), nn.Linear(4, 3)), X),
    Row("svdvals, qr, matrix norms", lambda: Module(lambda m, x: m.out(m.inp(x).tanh()) * (
        torch.linalg.svdvals(m.block.weight).prod() + torch.linalg.qr(m.inp.weight)[1].sum()
        + torch.linalg.matrix_norm(m.inp.weight, 2) + torch.linalg.det(m.block.weight)), **three()), X),
    Row("tied weights", tied, X),
    Row("frozen parameters", partly_frozen, X),
    Row("unused parameters", lambda: Module(lambda m, x: m.out(torch.tanh(m.inp(x))), **three()), X),
    # losses
    *(
        Row(name, net(nn.Tanh()), X, criterion, targets, way)
        for name, criterion, targets, way in [
            ("mse_loss", nn.MSELoss(), REAL, "traced"),
            ("mse_loss, sum", nn.MSELoss(reduction="sum"), REAL, "traced"),
            ("huber_loss", nn.HuberLoss(delta=0.5), REAL, "traced"),
            ("smooth_l1_loss", nn.SmoothL1Loss(), REAL, "traced"),
            ("soft_margin_loss", nn.SoftMarginLoss(), REAL.sign(), "traced"),
            ("multi_margin_loss", nn.MultiMarginLoss(p=2), classes(4, 3), "traced"),
            ("kl_div", lambda o, t: F.kl_div(o.log_softmax(1), t, reduction="batchmean"), UNIT, "traced"),
            ("binary_cross_entropy", lambda o, t: F.binary_cross_entropy(o.sigmoid(), t), UNIT, "traced"),
            ("binary_cross_entropy_with_logits", nn.BCEWithLogitsLoss(), UNIT, "traced"),
            ("nll_loss", lambda o, t: F.nll_loss(o.log_softmax(1), t), classes(4, 3), "traced"),
            ("cross_entropy, label smoothing", nn.CrossEntropyLoss(label_smoothing=0.1), classes(4, 3), "traced"),
            ("cosine_embedding_loss", lambda o, t: F.cosine_embedding_loss(o, t, torch.ones(4)), REAL, "traced"),
            ("gaussian_nll_loss", lambda o, t: F.gaussian_nll_loss(o, t, o.exp()), REAL, "traced"),
        ]
    ),
    Row("ctc_loss", lambda: Module(lambda m, x: m.out(torch.tanh(m.inp(x))).log_softmax(-1).transpose(0, 1), **three()),
        SEQUENCE, lambda o, t: F.ctc_loss(o, t, torch.full((4,), 5), torch.full((4,), 2)), 1 + classes(8, 2).view(4, 2),
        "difference"),
    # ways of computing
    Row("activation checkpointing", lambda: Module(blocks, **three()), X),
    Row("autograd.Function, old style", lambda: Module(
        lambda m, x: m.out(Cube.apply(m.inp(x))), **three()), X, way="double_backward"),
    Row("autograd.Function with setup_context", lambda: Module(
        lambda m, x: m.out(CubeWithSetup.apply(m.inp(x))), **three()), X, way="reverse"),
    Row("control flow on integers and masks", lambda: Module(
        lambda m, x, mask: m.out(m.inp(x).tanh() if mask.all() else m.inp(x).sin() * mask[:, None]), **three()),
        (X, torch.tensor([True, True, False, True]))),
    Row("gradient by the input inside", lambda: Module(slopes, **three()), X),
    Row("control flow on values", lambda: Module(branching, **three()), X, way="forward"),
    Row("outputs in a dict", lambda: Module(lambda m, x: {"logits": m.out(torch.tanh(m.inp(x)))}, **three()), X,
        lambda o, t: F.cross_entropy(o["logits"], t)),
]  # fmt: skip


def difference(model, criterion, batch, v, step=1e-4):
    """Five-point central difference of the model's own gradient, by plain autograd on copies of it."""

    def gradient(c):
        moved = copy.deepcopy(model).requires_grad_()
        params = dict(moved.named_parameters())
        with torch.no_grad():
            for name, p in params.items():
                p.add_(v[name], alpha=c)
        inputs = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
        loss = criterion(moved(*inputs), batch[1])
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in grads])

    near, far = (gradient(c * step) - gradient(-c * step) for c in (1, 2))
    return (8 * near - far) / (12 * step)


def problem(row):
    model = seeded(row.build)
    if "training" in row.what:
        model.train()
    return model, *functionalize(model, row.criterion), (row.inputs, row.targets)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.what)
def test_row(row):
    model, loss, params, batch = problem(row)
    with warnings.catch_warnings():
        if row.way not in ("traced", "forward"):
            warnings.simplefilter("ignore", UserWarning)
        matvec = hvp(loss, params, batch, trace_after=0)
        v, w = (tree.scale(1 / tree.norm(u), u) for u in gaussian(params, 2, seed=3))
        hv, hw = matvec(v), matvec(w)
    if row.what == "Embedding with padding_idx":
        assert (row.inputs == 2).any() and not hv["0.weight"][2].any()
        v["0.weight"][2] = 0  # the model's own gradient takes that row for a constant
    size = float(tree.norm(hv) + tree.norm(hw))
    assert size > 0
    assert torch.linalg.vector_norm(tree.ravel(hv)[0] - difference(model, row.criterion, batch, v)) <= 1e-8 * size
    assert abs(tree.dot(w, hv) - tree.dot(v, hw)) <= 1e-10 * size
    way = find_mode(loss, params, batch)
    assert way.mode == row.way, way
    if row.way == "traced":
        linearized = linearized_hvp(loss, params, batch)(v)
        assert tree.norm(tree.add(linearized, hv, -1.0)) <= 1e-12 * size
    assert (way.error > 0) == (row.way == "difference")


BEYOND_THE_REFERENCE = {"stft and istft", "LSTM, packed sequences"}  # they branch on constants and within rules


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row.way == "traced" and row.what not in BEYOND_THE_REFERENCE],
    ids=lambda row: row.what,
)
def test_the_recorder_and_its_reference_make_the_same_product(row):
    _, loss, params, batch = problem(row)
    v = tree.leaves(gaussian(params, 1)[0])
    found = {}
    for record in (by_recorder, by_reference):
        module = linear_graph(by_definition(loss), params, batch, record=record)
        with torch.no_grad():
            found[record] = module(*v)
    apart = tree.norm(tree.add(found[by_recorder], found[by_reference], -1.0))
    assert apart <= 1e-12 * tree.norm(found[by_reference])


class Aliases(fx.Interpreter):
    """Runs a graph, and notes which operations hand on the memory of an argument."""

    def run(self, *args):
        self.found = set()
        return super().run(*args)

    def call_function(self, target, args, kwargs):
        out = super().call_function(target, args, kwargs)
        given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))[0] if t.numel()}
        if any(t.untyped_storage().data_ptr() in given for t in tensors(out)[0] if t.numel()):
            self.found.add(target)
        return out


@pytest.mark.parametrize("row", [row for row in ROWS if row.way == "traced"], ids=lambda row: row.what)
def test_only_views_share_memory(row):
    """What is not known for a view would be written over while it is in use."""
    _, loss, params, batch = problem(row)
    graph = derivative_graph(by_definition(loss), params, batch)
    run = Aliases(graph)
    with torch.no_grad():
        run.run(*tensors((params, batch, gaussian(params, 1)[0]))[0])
    assert all(shares_memory(target) for target in run.found - {operator.getitem})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_inside_the_loss(dtype):
    model = seeded(net(nn.Tanh())).float()
    plain, params = functionalize(model, lambda outputs, targets: F.cross_entropy(outputs.float(), targets))
    batch = (X.float(), classes(4, 3))

    def loss(p, b):
        with torch.autocast("cpu", dtype=dtype):
            return plain(p, b)

    assert find_mode(loss, params, batch).mode == "traced"
    v, w = (tree.scale(1 / tree.norm(u), u) for u in gaussian(params, 2, seed=3))
    exact, matvec = hvp(plain, params, batch)(v), hvp(loss, params, batch)
    size = tree.norm(exact)
    assert tree.norm(tree.add(matvec(v), exact, -1.0)) <= 4 * torch.finfo(dtype).eps * size
    assert abs(tree.dot(w, matvec(v)) - tree.dot(v, matvec(w))) <= 4 * torch.finfo(dtype).eps * size


def test_the_documentation_has_the_same_table():
    page = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == [
        f"| {r.what} | {r.way} |" for r in ROWS
    ]


class _OnceCubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0] ** 2


def test_a_backward_without_a_derivative_is_not_taken_for_a_constant():
    def loss(w):
        return _OnceCubed.apply(w).sum() + (w**4).sum()

    w = torch.arange(1.0, 4.0, dtype=torch.float64)
    with pytest.warns(UserWarning, match="not exact"):
        found = hvp(loss, w)(torch.ones_like(w))
    torch.testing.assert_close(found, 6 * w + 12 * w**2, rtol=1e-8, atol=0.0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        hvp(loss, w, mode="double_backward")(torch.ones_like(w))


def test_what_a_loss_detaches_is_a_constant_also_to_double_backward():
    w = torch.arange(1.0, 4.0, dtype=torch.float64)
    found = hvp(lambda w: (w**3).sum() / w.detach().sum(), w, mode="double_backward")(torch.ones_like(w))
    torch.testing.assert_close(found, 6 * w / w.sum(), rtol=1e-12, atol=0.0)
