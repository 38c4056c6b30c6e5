import copy

import pytest
import torch
from nets import NETS, classes, normal, seeded
from torch import nn

from hessfn.losses.functional import functionalize, stateless


@pytest.mark.parametrize("net", NETS)
def test_the_pure_function_is_the_model(net):
    build, shape = NETS[net]
    model = seeded(build)
    forward, params = stateless(model)
    assert torch.allclose(forward(params, normal(*shape)), model(normal(*shape)), rtol=1e-13)
    assert list(params) == [name for name, _ in model.named_parameters()]
    assert not any(p.requires_grad for p in params.values())


def test_training_mode_batch_norm_uses_the_batch_and_writes_nothing():
    model = seeded(NETS["batch_norm"][0]).train()
    before = copy.deepcopy(model.state_dict())
    forward, params = stateless(model)
    outputs = forward(params, normal(5, 1, 5, 5))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.equal(outputs, model(normal(5, 1, 5, 5)))


def test_a_module_that_writes_to_its_buffers_writes_to_copies():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = nn.Sequential(nn.Linear(2, 2), Counter())
    forward, params = stateless(model)
    first, second = forward(params, torch.ones(1, 2)), forward(params, torch.ones(1, 2))
    assert torch.equal(first, second) and model[1].calls == 0


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_reparametrised_layers_are_functions_of_what_they_are_made_from(norm):
    model = seeded(lambda: norm(nn.Linear(3, 4)))
    model(normal(2, 3))  # leaves a non-leaf tensor on the module
    forward, params = stateless(model)
    assert any("orig" in name or "_g" in name for name in params)
    assert torch.allclose(forward(params, normal(2, 3)), model(normal(2, 3)), rtol=1e-12)


def test_tied_weights_are_one_parameter():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    forward, params = stateless(model)
    assert list(params) == ["0.weight", "0.bias", "2.bias"]
    doubled = {**params, "0.weight": 2 * params["0.weight"]}
    hidden = torch.tanh(normal(2, 3) @ doubled["0.weight"].T + params["0.bias"])
    assert torch.allclose(forward(doubled, normal(2, 3)), hidden @ doubled["0.weight"].T + params["2.bias"])


def test_a_module_of_two_names_is_the_same_net_at_every_call():
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    model[2].weight = model[0].weight
    twice = nn.Sequential(*model, nn.BatchNorm1d(3).double().eval(), model[0])
    forward, params = stateless(twice)
    assert list(params) == ["0.weight", "0.bias", "2.bias", "3.weight", "3.bias"]
    for _ in range(3):
        assert torch.allclose(forward(params, normal(2, 3)), twice(normal(2, 3)), rtol=1e-13)


def test_parameters_are_chosen_by_patterns_or_a_predicate():
    model = seeded(NETS["mlp"][0])
    model[0].weight.requires_grad_(False)
    assert list(stateless(model, params="2.*")[1]) == ["2.weight", "2.bias"]
    assert list(stateless(model, params=["0.bias", "*.weight"])[1]) == ["0.weight", "0.bias", "2.weight"]
    assert list(stateless(model, params=lambda name, p: p.requires_grad)[1]) == ["0.bias", "2.weight", "2.bias"]


def test_inputs_may_be_positional_or_named():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, a, b=None):
            return self.w * (a - b)

    forward, params = stateless(Two())
    a, b = torch.tensor(3.0), torch.tensor(1.0)
    assert forward(params, (a, b)) == forward(params, {"b": b, "a": a}) == 4.0
    loss, _ = functionalize(Two(), lambda outputs, batch: outputs * batch["b"])
    assert loss(params, {"a": a, "b": 2 * b}) == 4.0


def test_bad_input_is_named():
    model = seeded(NETS["mlp"][0])
    with pytest.raises(ValueError, match="no parameter matches params='conv.*'; the model has: 0.weight"):
        functionalize(model, nn.CrossEntropyLoss(), params="conv.*")
    with pytest.raises(ValueError, match="Dropout '0' drops out at random"):
        functionalize(nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2)), nn.MSELoss())
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="2 devices .*'1.bias' on meta"):
        functionalize(two, nn.MSELoss())
    counts = nn.Module()
    counts.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="'table' is torch.int8"):
        functionalize(counts, nn.MSELoss())
    loss, params = functionalize(model, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="pair"):
        loss(params, (normal(2, 4), classes(2, 3), None))


def test_a_model_is_not_asked_for_names_that_it_has_not():
    """Models of diffusers warn where a name of their config is asked for."""

    class Configured(nn.Linear):
        def __getattr__(self, name):
            if name == "dropout":
                raise AssertionError("a name of its config")
            return super().__getattr__(name)

    assert set(functionalize(Configured(3, 2), nn.MSELoss())[1]) == {"weight", "bias"}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_dropout_of_recurrent_layers_is_seen(kind):
    with pytest.raises(ValueError, match="drops out at random"):
        functionalize(kind(3, 2, num_layers=2, dropout=0.5), nn.MSELoss())
