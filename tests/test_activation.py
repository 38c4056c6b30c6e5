"""Activation Hessians against nets that are split by hand, so that what flows through a layer is an argument."""

import copy
import threading

import pytest
import torch
from nets import classes, normal, seeded
from torch import nn
from torch.func import functional_call

import hessfn as hf
from hessfn.core import tree

CE = nn.CrossEntropyLoss()


class Residual(nn.Module):
    """A tensor that two branches see, in-place activations, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.conv1, self.bn, self.conv2 = (
            nn.Conv2d(2, 2, 3, padding=1),
            nn.BatchNorm2d(2),
            nn.Conv2d(2, 2, 3, padding=1),
        )
        self.act = nn.SiLU(inplace=True)
        self.fc = nn.Linear(2, 3)

    def forward(self, x, shift=lambda name, t: t):
        x = self.stem(shift("stem", x))
        y = self.act(shift("act#1", self.bn(self.conv1(shift("conv1", x)))))
        y = self.act(shift("act#2", self.conv2(shift("conv2", y)) + x))
        return self.fc(shift("fc", y.mean((2, 3))))


class Dense(nn.Module):
    """Every layer sees what all layers before it gave."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3 + 2 * i, 2) for i in range(3)])
        self.unused = nn.Linear(2, 2)
        self.fc = nn.Linear(9, 3)

    def forward(self, x, shift=lambda name, t: t):
        for i, layer in enumerate(self.layers):
            x = torch.cat([x, torch.tanh(layer(shift(f"layers.{i}", x)))], 1)
        return self.fc(shift("fc", x))


class Attentive(nn.Module):
    """One tensor enters a layer three times."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn, self.fc = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, shift=lambda name, t: t):
        y = self.norm(shift("norm", x))
        q, k, v = (shift(f"attn:{name}", y) for name in ("query", "key", "value"))
        return self.fc(shift("fc", (x + self.attn(q, k, value=v, need_weights=False)[0]).mean(1)))


NETS = {
    "residual": (Residual, (3, 1, 3, 3), ["stem", "conv1", "act#1", "conv2", "act#2", "fc"]),
    "dense": (Dense, (3, 3), ["layers.0", "layers.1", "layers.2", "fc"]),
    "attention": (Attentive, (2, 3, 4), ["norm", "attn:query", "attn:key", "attn:value", "fc"]),
}


def taken_by_hand(model, x, y, names):
    """The dense Hessian of the loss by shifts that the net's own code adds."""
    seen = {}
    model(x, lambda name, t: seen.setdefault(name, t))
    flat, unravel = tree.ravel({name: torch.zeros_like(seen[name]) for name in names})

    def loss(s):
        shifts = unravel(s)
        return CE(model(x, lambda name, t: t + shifts.get(name, 0)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, flat)


def made(net):
    build, shape, names = NETS[net]
    model = seeded(build)
    for p in model.parameters():
        p.data *= 2  # curvature that no tolerance hides
    return model, (normal(*shape), classes(shape[0], 3)), names


@pytest.mark.parametrize("net", NETS)
def test_the_hessian_is_that_of_the_net_split_by_hand(net):
    model, (x, y), names = made(net)
    layers = ["stem", "conv?", "act", "fc"] if net == "residual" else [n.partition(":")[0] for n in names]
    loss, shifts = hf.activation_loss(model, CE, (x, y), layers)
    assert list(shifts) == names
    exact = taken_by_hand(model, x, y, names)
    assert exact.abs().max() > 1e-3
    H = hf.dense(hf.linearized_hvp(loss, shifts), shifts)
    assert (H - exact).abs().max() <= 1e-10 * exact.abs().max()
    assert (H - H.T).abs().max() <= 1e-12 * exact.abs().max()
    v = hf.gaussian(shifts, 1)[0]
    expected = exact @ tree.ravel(v)[0]
    for matvec in (hf.hvp(loss, shifts), hf.hvp(loss, shifts, mode="forward")):
        assert (tree.ravel(matvec(v))[0] - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("net", ["residual", "dense"])
def test_the_output_of_a_layer_is_the_input_of_what_alone_sees_it(net):
    model, batch, _ = made(net)
    whole = nn.Sequential(model, nn.Identity())
    at_output, shifts = hf.activation_loss(whole, CE, batch, "0", at="output")
    at_input, same = hf.activation_loss(whole, CE, batch, "1")
    v = hf.gaussian(shifts, 1)[0]
    product = hf.hvp(at_output, shifts)(v)["0"]
    assert torch.allclose(product, hf.hvp(at_input, same)({"1": v["0"]})["1"], rtol=1e-12)
    p = whole(batch[0]).softmax(1)  # the Hessian of cross-entropy: (diag p - pp') / B
    assert torch.allclose(product, p * (v["0"] - (p * v["0"]).sum(1, keepdim=True)) / len(p), rtol=1e-10)


def entries(shifts, name):
    """Where a layer's entries lie in the dense matrix."""
    start = sum(shift.numel() for shift in list(shifts.values())[: list(shifts).index(name)])
    return slice(start, start + shifts[name].numel())


def test_samples_do_not_meet_and_a_sum_undoes_the_mean():
    model, (x, y), _ = made("residual")
    loss, shifts = hf.activation_loss(model, CE, (x, y), "conv2")
    H = hf.dense(hf.hvp(loss, shifts), shifts).reshape(3, 18, 3, 18)
    summed, _ = hf.activation_loss(model, CE, (x, y), "conv2", reduction="sum")
    alone, shift = hf.activation_loss(model, CE, (x[1:2], y[1:2]), "conv2")
    own = hf.dense(hf.hvp(alone, shift), shift)
    assert torch.allclose(3 * H[1, :, 1], own, rtol=1e-10, atol=1e-14)
    assert torch.allclose(hf.dense(hf.hvp(summed, shifts), shifts).reshape(H.shape)[1, :, 1], own, atol=1e-14)
    assert all(not H[i, :, j].any() for i in range(3) for j in range(3) if i != j)


def test_one_product_gives_the_trace_of_every_sample():
    model, (x, y), _ = made("residual")
    loss, shifts = hf.activation_loss(model, CE, (x, y), ["conv2", "fc"])
    params = {name: p.detach() for name, p in model.named_parameters()}

    def single(x, y):
        def loss(shifts):
            return CE(functional_call(model, params, (x[None], lambda name, t: t + shifts.get(name, 0))), y[None])

        zeros = {"conv2": x.new_zeros(1, 2, 3, 3), "fc": x.new_zeros(1, 2)}
        H = torch.func.hessian(loss)(zeros)
        return {name: H[name][name].reshape(zeros[name].numel(), -1).trace() for name in zeros}

    each = torch.func.vmap(single)(x, y)
    traces = hf.hutchinson_per_sample(hf.hvp(loss, shifts), hf.rademacher(shifts, 200))
    whole = hf.hutchinson_per_leaf(hf.hvp(loss, shifts), hf.rademacher(shifts, 200))
    for name in shifts:
        assert ((traces.mean[name] - each[name]).abs() <= 4 * traces.stderr[name]).all()
        assert (traces.stderr[name] <= 0.3 * each[name].abs().max()).all()
        assert torch.allclose(traces.mean[name].mean(), whole.mean[name], rtol=1e-12)
    with pytest.raises(ValueError, match="first axis of every leaf.*'b': \\(3,\\)"):
        hf.hutchinson_per_sample(lambda v: v, [{"a": torch.ones(2, 2), "b": torch.ones(3)}])


def test_blocks_between_layers_eigenpairs_and_densities_are_those_of_the_dense_matrix():
    model, batch, _ = made("residual")
    loss, shifts = hf.activation_loss(model, CE, batch, ["stem", "conv?", "fc"])
    matvec = hf.linearized_hvp(loss, shifts)
    exact = taken_by_hand(model, *batch, list(shifts))
    i, j = entries(shifts, "conv1"), entries(shifts, "fc")
    between = hf.block(matvec, shifts, "conv1", "fc")
    v = hf.gaussian({"fc": shifts["fc"]}, 1)[0]
    assert torch.allclose(between(v)["conv1"].flatten(), exact[i, j] @ v["fc"].flatten(), rtol=1e-9, atol=1e-13)
    assert exact[i, j].abs().max() > 1e-3
    layer = {"conv1": shifts["conv1"]}
    own, values = hf.restrict(matvec, shifts, "conv1"), torch.linalg.eigvalsh(exact[i, i])
    top = hf.eigsh(own, hf.gaussian(layer, 1)[0], k=2, which="LA", rtol=1e-8)
    assert torch.allclose(top.values, values[-2:].flip(0), rtol=1e-7)
    quadrature = hf.slq(own, hf.gaussian(layer, 40), 10)
    moment = (quadrature.weights * quadrature.nodes).sum(1) * len(values)
    assert (moment.mean() - values.sum()).abs() <= 4 * moment.std() / 40**0.5


def test_layers_are_chosen_by_name_pattern_type_or_predicate():
    model, (x, _), _ = made("residual")

    def chosen(layers):
        return list(hf.activation_shapes(model, x, layers))

    convs = ["stem", "conv1", "conv2"]
    assert chosen(nn.Conv2d) == chosen(["stem", "conv*"]) == chosen(lambda name, m: isinstance(m, nn.Conv2d)) == convs
    assert chosen([nn.Linear, "conv1"]) == ["conv1", "fc"]
    assert chosen("act#2") == ["act#2"]
    assert chosen("*") == ["stem", "conv1", "bn", "act#1", "conv2", "act#2", "fc"]
    assert hf.activation_shapes(model, x, "fc", at="output") == {"fc": (3, 3)}
    shared = nn.Sequential(model.fc, nn.Linear(3, 2).double(), model.fc)
    assert list(hf.activation_shapes(shared, normal(4, 2), "2")) == ["0#1", "0#2"]  # by its other name


def test_several_inputs_and_outputs_have_names():
    class Two(nn.Module):
        def forward(self, x, *others, mask=None, scale):
            return {"sum": (x + others[0]) * scale, "pair": (x, len(others))}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.rnn = Two(), nn.LSTM(2, 2, batch_first=True)

        def forward(self, x):
            two = self.two(x, x, mask=torch.ones(2, dtype=torch.bool), scale=x)
            return self.rnn(two["sum"])[0].sum((1, 2)) + two["pair"][0].sum()

    net, x = seeded(Net), normal(2, 3, 2)
    assert list(hf.activation_shapes(net, x)) == ["two:x", "two:1", "two:scale", "rnn"]
    outputs = hf.activation_shapes(net, {"x": x}, at="output")
    assert list(outputs) == ["two:sum", "two:pair.0", "rnn:0", "rnn:1.0", "rnn:1.1"]
    loss, shifts = hf.activation_loss(net, lambda out, _: out.sum(), (x, x), ["two:x", "two:scale"])
    v = hf.gaussian(shifts, 1)[0]
    moved = net.rnn((x + v["two:x"] + x) * (x + v["two:scale"]))[0].sum() * 1.0 + 2 * (x + v["two:x"]).sum()
    assert torch.allclose(loss(v), moved)


@pytest.mark.parametrize("fails", ["nowhere", "in a layer", "in the criterion"])
def test_nothing_of_the_model_changes(fails):
    model, batch, _ = made("residual")
    model.conv2.register_forward_hook(lambda module, args, output: None)
    before = copy.deepcopy(model)
    loss, shifts = hf.activation_loss(model, CE, batch, "*")
    if fails == "in a layer":
        with pytest.raises(RuntimeError):
            loss({**shifts, "conv1": torch.zeros(7, dtype=torch.float64)})
        with pytest.raises(RuntimeError):
            hf.activation_loss(model, CE, (batch[0][:, :, 0], batch[1]), "*")
    elif fails == "in the criterion":
        with pytest.raises(ValueError, match="batch_size"):
            hf.activation_loss(model, CE, (batch[0], batch[1][:2]), "*")
    else:
        hf.linearized_hvp(loss, shifts)(shifts)
        hf.hvp(loss, shifts)(shifts)
    for module, old in zip(model.modules(), before.modules(), strict=True):
        assert len(module._forward_hooks) == len(old._forward_hooks) and not module._forward_pre_hooks
        assert module.training is old.training
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, old) and p.grad is None and p.requires_grad
    at_zero = loss(shifts)  # also not of the private copy, after an exception
    assert torch.allclose(at_zero, CE(model(batch[0]), batch[1])) and not at_zero.requires_grad


def test_blocks_of_a_transformer():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2, enable_nested_tensor=False
    )
    model = seeded(lambda: nn.Sequential(encoder, nn.Flatten(), nn.Linear(12, 3)))
    loss, shifts = hf.activation_loss(
        model, CE, (normal(2, 3, 4), classes(2, 3)), [nn.TransformerEncoderLayer, "*.linear?"]
    )
    assert list(shifts) == [f"0.layers.{i}{part}" for i in (0, 1) for part in ("", ".linear1", ".linear2")]
    last, v = {"0.layers.1": shifts["0.layers.1"]}, hf.gaussian(shifts, 1)[0]
    hf.check_matvec(hf.hvp(loss, shifts), shifts, rtol=1e-10)
    rest = nn.Sequential(model[0].layers[1], *model[1:])  # from the last block on, by hand
    with torch.no_grad():
        entering = model[0].layers[0](normal(2, 3, 4))
    alone, same = hf.activation_loss(rest, CE, (entering, classes(2, 3)), "0")
    product = hf.hvp(loss, last)({"0.layers.1": v["0.layers.1"]})["0.layers.1"]
    assert torch.allclose(product, hf.hvp(alone, same)({"0": v["0.layers.1"]})["0"], rtol=1e-9, atol=1e-12)


class Padded(nn.Module):
    """What is padded is masked, in the mean as in the attention."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.encoder, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x, padding, shifts=(0, 0)):
        for layer, shift in zip(self.encoder.layers, shifts, strict=True):
            x = layer(x + shift, src_key_padding_mask=padding)
        return self.pooled(x, padding)

    def pooled(self, x, padding):
        there = ~padding[..., None]
        return self.fc((x * there).sum(1) / there.sum(1))


class ByEncoder(Padded):
    def forward(self, x, padding):
        return self.pooled(self.encoder(x, src_key_padding_mask=padding), padding)


def test_padded_sequences_enter_the_blocks_of_a_transformer_as_they_are():
    """In eval mode torch's own encoder would pack them away, where nothing asks for a gradient."""
    model, by_hand = seeded(ByEncoder), seeded(Padded)
    x, padding, y = normal(3, 4, 4), torch.arange(4) >= torch.tensor([[4], [3], [2]]), classes(3, 3)
    loss, shifts = hf.activation_loss(model, CE, ((x, padding), y), "encoder.layers.?:src")
    assert {name: shift.shape for name, shift in shifts.items()} == {f"encoder.layers.{i}:src": x.shape for i in (0, 1)}

    def loss_by_hand(s):
        return CE(by_hand(x, padding, s.reshape(2, *x.shape)), y)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.autograd.functional.hessian(loss_by_hand, torch.zeros(2 * x.numel()).double())
    assert exact.abs().max() > 1e-3
    H = hf.dense(hf.linearized_hvp(loss, shifts), shifts)
    assert (H - exact).abs().max() <= 1e-10 * exact.abs().max()
    unseen = padding[None, ..., None].expand(2, *x.shape).flatten()
    assert unseen.any() and not exact[unseen].any() and not H[unseen].any()
    whole, params = hf.functionalize(model, CE)
    assert torch.allclose(whole(params, ((x, padding), y)), CE(by_hand(x, padding), y), rtol=1e-12)


def test_frozen_layers_are_layers():
    model, batch, _ = made("residual")
    for p in model.parameters():
        p.requires_grad_(False)
    loss, shifts = hf.activation_loss(model, CE, batch, "stem")
    assert tree.norm(hf.hvp(loss, shifts)(hf.gaussian(shifts, 1)[0])) > 1e-3


def test_a_linearized_product_stays_as_the_weights_were():
    model, batch, _ = made("residual")
    loss, shifts = hf.activation_loss(model, CE, batch, "conv1")
    matvec, v = hf.linearized_hvp(loss, shifts), hf.gaussian(shifts, 1)[0]
    before = matvec(v)["conv1"]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.equal(matvec(v)["conv1"], before)
    assert not torch.allclose(hf.hvp(loss, shifts)(v)["conv1"], before)


def test_threads_do_not_meet():
    """Neither with one loss, nor with losses of their own of one model."""
    model, batch, _ = made("residual")
    layers = [["conv?", "fc"], ["stem", "act"]] * 4
    loss, shifts = hf.activation_loss(model, CE, batch, layers[0])
    points = hf.gaussian(shifts, 8)

    def products(layers):
        own, zeros = hf.activation_loss(model, CE, batch, layers)
        return hf.hvp(own, zeros, mode="forward")(hf.gaussian(zeros, 1)[0])

    alone, together = [(loss(p), products(at)) for p, at in zip(points, layers, strict=True)], [None] * 8

    def work(i):
        for _ in range(3):
            together[i] = loss(points[i]), products(layers[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same = zip(tree.leaves(alone), tree.leaves(together), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_bad_input_is_named():
    model, batch, _ = made("dense")
    with pytest.raises(ValueError, match="layer 'layer.1' is not in the model; did you mean 'layers.1'"):
        hf.activation_loss(model, CE, batch, "layer.1")
    with pytest.raises(ValueError, match="no layer matches .*Conv2d.*; there are: layers, layers.0"):
        hf.activation_loss(model, CE, batch, nn.Conv2d)
    with pytest.raises(ValueError, match="does not call 'unused' on this batch"):
        hf.activation_loss(model, CE, batch, nn.Linear)
    with pytest.raises(ValueError, match="does not call .'layers'. on this batch"):
        hf.activation_loss(model, CE, batch, "layers")
    with pytest.raises(ValueError, match="at='middle' must be 'input' or 'output'"):
        hf.activation_loss(model, CE, batch, "fc", at="middle")
    with pytest.raises(ValueError, match="reduction='none' must be"):
        hf.activation_loss(model, CE, batch, "fc", reduction="none")
    words = seeded(lambda: nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no floating-point tensor enters '0': .*at="):
        hf.activation_loss(words, CE, (classes(4, 5), classes(4, 3)), "*")
    assert list(hf.activation_shapes(words, classes(4, 5))) == ["1"]


def test_a_layer_that_changes_in_place_what_others_see_is_refused():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act = nn.Linear(3, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            x = self.first(x)
            return self.act(x) + x

    batch = normal(4, 3), classes(4, 3)
    with pytest.raises(ValueError, match="shifts of 0 change the loss .*'act'.* in place"):
        hf.activation_loss(seeded(Careless), CE, batch, "act")
    loss, shifts = hf.activation_loss(seeded(Careless), CE, batch, "first")
    hf.check_matvec(hf.hvp(loss, shifts), shifts)
