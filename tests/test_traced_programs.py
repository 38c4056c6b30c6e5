"""Programs as people write them are traced and linearized, and a trace knows for which integers it is good."""

import pytest
import torch
import torch.nn.functional as F
from nets import classes, dense_hessian, normal, seeded
from torch import nn

import hessfn as hf
from hessfn.core import tree
from hessfn.core.errors import Untraceable
from hessfn.engine import pipeline
from hessfn.engine.op_definitions import by_definition
from hessfn.engine.pipeline import LOSS, PRODUCT, Job, as_function, clean

W = {"w": normal(5)}


def assert_traced(loss, params, *args):
    """Both traced products are those of the dense Hessian by plain autograd."""
    v = hf.gaussian(params, 1, seed=5)[0]
    exact = dense_hessian(loss, params, *args) @ tree.ravel(v)[0]
    assert exact.any()
    for matvec in (hf.hvp(loss, params, *args, mode="traced"), hf.linearized_hvp(loss, params, *args)):
        found = tree.ravel(matvec(v))[0]
        assert torch.linalg.vector_norm(found - exact) <= 1e-9 * torch.linalg.vector_norm(exact)


def messages(p, edges):
    num_nodes = int(edges.max()) + 1
    degree = torch.bincount(edges[1], minlength=num_nodes).clamp(min=1)
    return (torch.zeros(num_nodes).double().index_add(0, edges[1], p["w"][edges[0]] ** 2) / degree).pow(2).sum()


def assigned(p, n):
    hidden = p["w"] * 2
    hidden[n > 1] = 0.5
    return hidden.pow(3).sum() * n.sum().item()


def by_mask(p, mask):
    return (p["w"] ** 3)[mask].sum() if mask.any() else (p["w"] ** 4).sum()


N = torch.tensor([2, 3, 0, 3, 1])
# A loss, integers for it, others with which every decision falls out the same (None: there are none), and which do not.
DECIDED = {
    "mask": (by_mask, torch.tensor([True, False, True, True, False]), torch.tensor([True, True, False, False, True]),
             torch.tensor([False] * 5)),
    "nonzero": (lambda p, n: (p["w"] ** 3)[n.nonzero()[:, 0]].sum() * len(n.nonzero()), N, N.flip(0), N * 0 + 1),
    "number of nodes": (messages, torch.tensor([[0, 1, 2, 3, 4], [1, 1, 2, 0, 0]]),
                        torch.tensor([[0, 1, 1, 3, 4], [4, 1, 2, 0, 0]]), torch.tensor([[0, 1, 2, 3], [1, 1, 2, 0]])),
    "tolist": (lambda p, n: sum((x**3).sum() * i for i, x in enumerate(p["w"].split(n.tolist()))),
               torch.tensor([2, 3]), None, torch.tensor([3, 2])),
    "numpy": (lambda p, n: (p["w"][: n.numpy().max()] ** 3).sum(), N, None, N + 1),
    "repeats": (lambda p, n: p["w"].repeat_interleave(n).sin().sum(), N, N.flip(0), N + 1),
    "one_hot": (lambda p, n: (F.one_hot(n).double() @ p["w"][: n.max() + 1]).sin().sum(), N, N.flip(0), N - N % 2),
    "masked_select": (lambda p, n: p["w"].masked_select(n > 1).pow(3).sum(), N, N.flip(0), N + 2),
    "unique": (lambda p, n: p["w"][: len(n.unique())].pow(3).sum(), N, N.flip(0), N.clamp(max=1)),
    "item": (assigned, N, N.flip(0), N + 1),
    "equal": (lambda p, n: p["w"].pow(4 if torch.equal(n, n.sort()[0]) else 3).sum(), N, N.roll(1), N.sort()[0]),
    "a tensor of numbers": (lambda p, n: (p["w"][:2] ** 3 * torch.tensor([n[0], n[1]])).sum(), N, None, N + 1),
    "split by a tensor": (lambda p, n: p["w"].tensor_split(n)[1].pow(3).sum(), torch.tensor([1, 3]), None,
                          torch.tensor([2, 4])),
}  # fmt: skip


@pytest.mark.parametrize("case", DECIDED)
def test_what_integers_decide_is_traced_and_guarded(case):
    loss, given, alike, other = DECIDED[case]
    assert_traced(loss, W, given)
    for stages in (LOSS, LOSS + PRODUCT):
        module = pipeline.run(stages, None, Job(loss, W, (given,)))
        assert pipeline.holds(module, W, (given.clone(),))
        assert given.shape != other.shape or not pipeline.holds(module, W, (other,))
        assert alike is None or pipeline.holds(module, W, (alike,))
    graph = clean(loss, W, given)
    if alike is not None:  # the values are inputs of the graph all the same
        torch.testing.assert_close(graph(W, alike), loss(W, alike), rtol=1e-12, atol=0.0)
    if given.shape == other.shape:
        with pytest.raises(Untraceable, match="another branch"):
            graph(W, other)


@pytest.mark.parametrize("case", DECIDED)
def test_one_product_serves_all_integers(case):
    loss, *integers = DECIDED[case]
    v = hf.gaussian(W, 1)[0]
    for given in integers:
        if given is not None:
            exact = dense_hessian(loss, W, given) @ v["w"]
            torch.testing.assert_close(hf.hvp(loss, W, given, mode="traced")(v)["w"], exact, rtol=1e-9, atol=1e-12)


def test_what_a_derivative_rule_decides_is_guarded_too():
    def loss(p, mask):
        full = torch.zeros(5, dtype=torch.float64).masked_scatter(mask, p["w"] ** 3)
        return (full * torch.arange(5)).square().sum()

    given, other = torch.tensor([True, False, True, False, True]), torch.tensor([True, False, False, False, True])
    assert_traced(loss, W, given)
    module = pipeline.run(LOSS + PRODUCT, None, Job(loss, W, (given,)))
    v = hf.gaussian(W, 1)[0]
    found = module(W["w"], other, v["w"])[0] if pipeline.holds(module, W, (other,)) else None
    exact = dense_hessian(loss, W, other) @ v["w"]
    assert found is None or torch.allclose(found, exact, rtol=1e-9)


def test_nothing_is_guarded_where_nothing_was_decided():
    module = pipeline.run(LOSS + PRODUCT, None, Job(lambda p, n: (p["w"] ** 3)[n].sum(), W, (torch.tensor([0, 2]),)))
    assert not module.meta["guards"]
    assert pipeline.holds(module, W, (torch.tensor([4, 4]),))


def test_the_reference_is_good_for_its_integers_alone():
    def loss(p, n):
        hidden = torch.cat([p["w"], p["w"]]) * n.sum()
        hidden.unfold(0, 5, 5).mul_(p["w"])  # windows are too much for the recorder's alias analysis
        return (hidden**3).sum()

    assert_traced(loss, W, N)
    module = pipeline.run(LOSS, None, Job(loss, W, (N,)))
    assert pipeline.holds(module, W, (N.clone(),)) and not pipeline.holds(module, W, (N + 1,))


def test_floating_point_values_still_decide_nothing():
    for loss in (
        lambda p, x: p["w"].sum() if x.sum() > 0 else -p["w"].sum(),
        lambda p, x: p["w"][x > 0].sum(),
        lambda p, x: (p["w"] * x.tolist()[0]).sum(),
        lambda p, x: (p["w"][:2] * torch.tensor([(p["w"][0] * 2), 1.0])).sum(),
        lambda p, x: p["w"][: int(p["w"].argmax()) + 1].sum(),
    ):
        with pytest.raises(Untraceable, match="values? (of|computed)"):
            clean(loss, W, normal(5))


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0].sum(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind):
    loss, params = hf.functionalize(seeded(lambda: Packed(kind)), nn.MSELoss())
    for lengths in (torch.tensor([3, 5, 2]), torch.tensor([1, 4, 2])):
        assert_traced(loss, params, ((normal(3, 5, 3), lengths), normal(3, 2)))


def gpt2(tf):
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=17, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def llama(tf):
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


def bert(tf):
    return tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


def opt(tf):
    return tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=17, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=8, word_embed_proj_dim=8
        )
    )


def t5(tf):
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", [gpt2, llama, bert, opt, t5])
def test_transformers_with_a_mask(family):
    """Their norms and losses compute in float32; which branch a mask takes is seen by whether all of it is set."""
    transformers = pytest.importorskip("transformers")
    model = seeded(lambda: family(transformers))
    loss, params = hf.functionalize(model, lambda outputs, batch: outputs.loss, params=lambda name, p: p.dim() == 1)
    words, v = 2 + classes(12, 15).view(2, 6), hf.gaussian(params, 1)[0]
    masks = torch.ones(3, 2, 6, dtype=torch.long)
    masks[1, 0, 4:], masks[2, 1, :2] = 0, 0
    for mask in masks:
        batch = {"input_ids": words, "attention_mask": mask, "labels": words}
        exact = dense_hessian(loss, params, batch) @ tree.ravel(v)[0]
        for matvec in (hf.hvp(loss, params, batch, mode="traced"), hf.linearized_hvp(loss, params, batch)):
            torch.testing.assert_close(tree.ravel(matvec(v))[0], exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


D = torch.distributions
ONES = torch.ones(5, dtype=torch.float64)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p: -D.Normal(p["w"], p["w"].exp(), validate_args=True).log_prob(ONES).sum(),
        lambda p: -D.Categorical(logits=p["w"]).log_prob(torch.tensor([1, 4])).sum(),
        lambda p: D.kl_divergence(D.Beta(p["w"].exp(), p["w"].exp()), D.Beta(ONES, ONES)).sum(),
        lambda p: -D.Independent(D.Bernoulli(logits=p["w"]), 1).log_prob(ONES.round()).square(),
    ],
    ids=["normal", "categorical", "divergence", "independent"],
)
def test_distributions_that_validate(loss):
    assert_traced(loss, W)


C = normal(5, seed=9)
DETACHED = {
    "constant": lambda p: (p["w"] - C.detach()).pow(4).sum(),
    "data of a constant": lambda p: (p["w"] - C.data).pow(4).sum(),
    "in place": lambda p: (p["w"].pow(3) * C.clone().detach_()).sum(),
    "of what follows from parameters": lambda p: (p["w"].pow(3) * (p["w"] * C).detach().exp()).sum(),
    "a number": lambda p: (p["w"] * torch.tensor(2.0, dtype=torch.float64).detach()).pow(3).sum(),
}


@pytest.mark.parametrize("case", DETACHED)
def test_constants_that_are_detached(case):
    assert_traced(DETACHED[case], W)


def test_padding_of_an_embedding_that_is_no_parameter():
    def net():
        return nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3))

    words, criterion = classes(10, 7).view(2, 5), lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten())
    loss, params = hf.functionalize(seeded(net), criterion, params="1.*")
    assert_traced(loss, params, (words, classes(10, 3).view(2, 5)))
    loss, shifts = hf.activation_loss(seeded(net), criterion, (words, classes(10, 3).view(2, 5)), "1")
    assert_traced(loss, shifts)


# Losses that differentiate inside.


def mlp(width=4):
    return seeded(lambda: nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)))


def derivative(y, x):
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


FORWARD, PARAMS = hf.stateless(mlp())
AT = normal(6, 2)


def laplacian(p, x):
    x = x.detach().requires_grad_()
    slope = derivative(FORWARD(p, x), x)
    second = sum(derivative(slope[:, i], x)[:, i] for i in range(2))
    return (second + FORWARD(p, x)[:, 0].sin()).square().mean()


def given(p, x):
    return (derivative(FORWARD(p, x), x) + x).square().mean()


def penalty(p, x):
    hidden = torch.tanh(F.linear(x, p["0.weight"], p["0.bias"]))
    slope = derivative(F.linear(hidden, p["2.weight"], p["2.bias"]), hidden)
    return (slope.norm(dim=1) - 1).square().mean() + hidden.square().mean()


def adapted(p, x):
    inner = (FORWARD(p, x) - x[:, :1]).square().mean()
    steps = torch.autograd.grad(inner, list(p.values()), create_graph=True)
    return (FORWARD({n: q - 0.3 * g for (n, q), g in zip(p.items(), steps, strict=True)}, x) - 1).square().mean()


def by_transform(p, x):
    slope = torch.func.vmap(torch.func.grad(lambda x: FORWARD(p, x[None]).sum()))(x)
    return slope.square().mean()


INSIDE = {
    "physics": (laplacian, AT),
    "an input from outside": (given, AT.clone().requires_grad_()),
    "penalty by features": (penalty, AT),
    "by parameters": (adapted, AT),
    "by torch.func": (by_transform, AT),
}


@pytest.mark.parametrize("case", INSIDE)
def test_losses_that_differentiate_inside(case):
    loss, x = INSIDE[case]
    if x.requires_grad:
        with torch.no_grad():  # linearized_hvp has no derivatives by the data, and says so
            assert_traced(loss, PARAMS, x)
    else:
        assert_traced(loss, PARAMS, x)


def test_the_graph_of_a_loss_has_derivatives_by_its_arguments():
    x = AT.clone().requires_grad_()
    graph = as_function(pipeline.run(LOSS, None, Job(by_definition(given), PARAMS, (x,))))

    def sharpness(loss):
        v = tree.map(torch.ones_like, PARAMS)
        product = torch.func.jvp(lambda p: torch.func.grad(loss)(p, x), (PARAMS,), (v,))[1]
        return torch.autograd.grad(tree.dot(product, v), x)[0]

    def plain():
        leaves = {n: p.clone().requires_grad_() for n, p in PARAMS.items()}
        first = torch.autograd.grad(given(leaves, x), list(leaves.values()), create_graph=True, materialize_grads=True,
                                    allow_unused=True)  # fmt: skip
        along = sum(g.sum() for g in first)
        second = torch.autograd.grad(along, list(leaves.values()), create_graph=True, materialize_grads=True,
                                     allow_unused=True)  # fmt: skip
        return torch.autograd.grad(sum(g.sum() for g in second), x)[0]

    torch.testing.assert_close(sharpness(graph), plain(), rtol=1e-10, atol=1e-12)


def test_a_gradient_without_a_graph_is_refused():
    def first_order(p, x):
        (slope,) = torch.autograd.grad((p["w"] ** 3).sum(), p["w"])
        return ((p["w"] - 0.1 * slope) * x).square().sum()

    with pytest.raises(Untraceable, match="create_graph=True"):
        clean(first_order, W, normal(5))


# What a refusal says.


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, g):
        return -g


def compiled(p):
    return torch.cond(p["w"].sum() > 0, torch.sin, torch.cos, (p["w"],)).sum()


REFUSED = {
    "a branch": (lambda p: p["w"].sum() if p["w"].sum() > 0 else -p["w"].sum(), "torch.where"),
    "a mask": (lambda p: p["w"][p["w"] > 0].sum(), "multiply by the mask"),
    "an outside tensor": (lambda p: (C.mul_(p["w"])).sum(), "write into a clone"),
    "random numbers": (lambda p: (torch.rand_like(p["w"]) * p["w"]).sum(), "give them with the batch"),
    "a function": (lambda p: Doubled.apply(p["w"] ** 3).sum(), "autograd.Function .Doubled."),
    "no_grad": (lambda p: (torch.no_grad()(torch.exp)(p["w"]) * p["w"]).sum(), "torch.no_grad"),
    "inference": (lambda p: (torch.inference_mode()(torch.exp)(p["w"]) * p["w"]).sum(), "inference_mode"),
    "torch.cond": (compiled, "torch.cond, which no trace follows"),
    "segments": (
        lambda p: torch.segment_reduce(p["w"], "sum", lengths=torch.tensor([2, 3])).square().sum(),
        "torch has no derivative of segment_reduce",
    ),
    "jagged": (
        lambda p: torch.nested.nested_tensor_from_jagged(p["w"][:, None], torch.tensor([0, 2, 5])).sin().values().sum(),
        "nested .jagged. tensors: pad them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_a_refusal_names_the_cause_and_the_remedy(case):
    loss, words = REFUSED[case]
    with pytest.raises(Untraceable, match=words) as refusal:
        pipeline.run(LOSS + PRODUCT, None, Job(loss, W, ()))
    assert len(str(refusal.value)) < 240 and "\n" not in str(refusal.value)
