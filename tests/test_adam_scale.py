"""Adam's scale against the steps that torch's own optimiser takes: before - after = lr P^-1 m."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nets import normal
from torch import Tensor, nn
from torch.optim import Adam, AdamW

import hessfn as hf


class Two(nn.Module):
    """A loss of two parameters that is another one at every step, as over batches."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Parameter(normal(3, 4).to(dtype))
        self.b = nn.Parameter(normal(5, seed=3).to(dtype))

    def forward(self, t: int) -> Tensor:
        return (self.a - 0.3 * t).pow(4).real.sum() / 9 + (self.b.sin() * normal(5, seed=t).to(self.b.dtype)).real.sum()


def grouped(model: Two) -> list[dict[str, Any]]:
    return [{"params": [model.a], "betas": (0.7, 0.9), "eps": 1e-3, "lr": 0.05}, {"params": [model.b], "lr": 0.02}]


MAKERS: dict[str, Callable[[Two], Adam]] = {
    "plain": lambda m: Adam(m.parameters(), lr=0.05),
    "betas": lambda m: Adam(m.parameters(), lr=0.05, betas=(0.8, 0.95), eps=1e-2),
    "no momentum": lambda m: Adam(m.parameters(), lr=0.05, betas=(0.0, 0.999)),
    "no memory": lambda m: Adam(m.parameters(), lr=0.05, betas=(0.5, 0.0)),
    "amsgrad": lambda m: Adam(m.parameters(), lr=0.05, betas=(0.9, 0.5), amsgrad=True),
    "for loop": lambda m: Adam(m.parameters(), lr=0.05, foreach=False),
    "foreach": lambda m: Adam(m.parameters(), lr=0.05, foreach=True),
    "fused": lambda m: Adam(m.parameters(), lr=0.05, fused=True),
    "lr tensor": lambda m: Adam(m.parameters(), lr=torch.tensor(0.05, dtype=torch.float64), foreach=False),
    "L2": lambda m: Adam(m.parameters(), lr=0.05, weight_decay=0.1),
    "maximize": lambda m: Adam(m.parameters(), lr=0.05, maximize=True),
    "groups": lambda m: Adam(grouped(m), lr=0.05),
    "AdamW": lambda m: AdamW(m.parameters(), lr=0.05, weight_decay=0.0),
    "decay": lambda m: AdamW(m.parameters(), lr=0.05, weight_decay=0.3),
    "decay, amsgrad, groups": lambda m: AdamW(grouped(m), lr=0.05, weight_decay=0.3, amsgrad=True),
}


def trained(
    make: Callable[[Two], Any], num_steps: int, dtype: torch.dtype = torch.float64
) -> tuple[Two, Any, dict[str, Tensor]]:
    """Model, optimiser and the parameters before the last step, after so many."""
    model = Two(dtype)
    optimizer = make(model)
    before: dict[str, Tensor] = {}
    for t in range(num_steps):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        model(t).backward()
        optimizer.step()
    return model, optimizer, before


@pytest.mark.parametrize("num_steps", [1, 2, 40])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_step_of_the_optimiser_is_the_mean_gradient_over_what_the_scale_says(make: Any, num_steps: int) -> None:
    model, optimizer, before = trained(make, num_steps)
    scale = hf.adam_scale(optimizer, dict(model.named_parameters()))
    assert list(scale) == ["a", "b"]
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = next(name for name, q in model.named_parameters() if q is p)
            decay = group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
            moved = before[name] * (1 - group["lr"] * decay) - p.detach()
            exact = group["lr"] * scale[name] ** 2 * optimizer.state[p]["exp_avg"].detach()
            assert torch.allclose(moved, exact, rtol=1e-9, atol=1e-12), name
            assert scale[name].shape == p.shape and scale[name].dtype == p.dtype


def test_of_a_complex_parameter_it_is_that_of_the_real_view() -> None:
    model, optimizer, before = trained(lambda m: Adam(m.parameters(), lr=0.05), 5, torch.complex128)
    scale = hf.adam_scale(optimizer, dict(model.named_parameters()))
    for name, p in model.named_parameters():
        moved = torch.view_as_real(before[name] - p.detach())
        assert scale[name].shape == moved.shape
        assert torch.allclose(moved, 0.05 * scale[name] ** 2 * torch.view_as_real(optimizer.state[p]["exp_avg"]))
    _, params = hf.functionalize(model, lambda outputs, targets: outputs.abs())
    assert {name: leaf.shape for name, leaf in params.items()} == {name: s.shape for name, s in scale.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_coarse_dtype_gets_what_its_digits_hold(dtype: torch.dtype) -> None:
    model, optimizer, _ = trained(lambda m: Adam(m.parameters(), lr=0.05), 30, dtype)
    scale = hf.adam_scale(optimizer, dict(model.named_parameters()))
    for name, p in model.named_parameters():
        v = optimizer.state[p]["exp_avg_sq"].double()
        exact = (((v / (1 - 0.999**30)).sqrt() + 1e-8) * (1 - 0.9**30)).rsqrt()
        assert scale[name].dtype == dtype
        assert ((scale[name].double() / exact - 1).abs() <= torch.finfo(dtype).eps).all()


def test_it_changes_nothing_and_shares_no_memory() -> None:
    model, optimizer, _ = trained(MAKERS["amsgrad"], 3)
    saved = {k: v.clone() for k, v in enumerate(t for s in optimizer.state.values() for t in s.values())}
    scale = hf.adam_scale(optimizer, dict(model.named_parameters()))
    kept = {name: s.clone() for name, s in scale.items()}
    for name in scale:
        assert not scale[name].requires_grad
    assert all(torch.equal(saved[k], t) for k, t in enumerate(t for s in optimizer.state.values() for t in s.values()))
    model(3).backward()
    optimizer.step()
    assert all(torch.equal(scale[name], kept[name]) for name in scale)  # it is that of its step
    assert not torch.equal(hf.adam_scale(optimizer, dict(model.named_parameters()))["a"], scale["a"])


def test_any_tree_of_the_tensors_and_any_part_of_them_will_do() -> None:
    model, optimizer, _ = trained(MAKERS["groups"], 3)
    whole = hf.adam_scale(optimizer, dict(model.named_parameters()))
    assert torch.equal(hf.adam_scale(optimizer, model.b), whole["b"])
    part = hf.adam_scale(optimizer, [{"x": model.b}, model.a])
    assert torch.equal(part[0]["x"], whole["b"]) and torch.equal(part[1], whole["a"])


def test_a_state_that_was_loaded_is_the_state() -> None:
    model, optimizer, _ = trained(MAKERS["groups"], 4)
    other = Two()
    again = MAKERS["groups"](other)
    again.load_state_dict(optimizer.state_dict())
    first = hf.adam_scale(optimizer, dict(model.named_parameters()))
    second = hf.adam_scale(again, dict(other.named_parameters()))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Logged(Adam):
    pass


class Clipped(Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """As those of accelerate and Lightning: not the optimizer, but with it."""

    def __init__(self, optimizer: Adam) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()


@pytest.mark.parametrize("make", [lambda m: Logged(m.parameters()), lambda m: Wrapper(Adam(m.parameters()))])
def test_a_subclass_that_steps_as_adam_and_a_wrapper_are_adam(make: Any) -> None:
    model, optimizer, _ = trained(make, 3)
    plain_model, plain, _ = trained(lambda m: Adam(m.parameters()), 3)
    found = hf.adam_scale(optimizer, dict(model.named_parameters()))
    exact = hf.adam_scale(plain, dict(plain_model.named_parameters()))
    assert all(torch.equal(found[name], exact[name]) for name in exact)


OTHERS = {
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "optimizer is of type SGD"),
    "RAdam": (lambda m: torch.optim.RAdam(m.parameters()), "optimizer is of type RAdam"),
    "NAdam": (lambda m: torch.optim.NAdam(m.parameters()), "optimizer is of type NAdam"),
    "own step": (lambda m: Clipped(m.parameters()), "Clipped has a step of its own"),
}


@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_of_another_optimiser_it_is_an_error(make: Any, message: str) -> None:
    model, optimizer, _ = trained(make, 2)
    with pytest.raises(ValueError, match=f"{message}.*scaled"):
        hf.adam_scale(optimizer, dict(model.named_parameters()))


def test_a_parameter_without_a_state_is_an_error_that_names_it() -> None:
    model = Two()
    with pytest.raises(ValueError, match="parameter 'a' has no state yet: call it after a step"):
        hf.adam_scale(Adam(model.parameters()), dict(model.named_parameters()))
    model.b.requires_grad_(False)
    optimizer = Adam(model.parameters())
    model(0).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="parameter 'b' has no state yet"):
        hf.adam_scale(optimizer, dict(model.named_parameters()))
    assert list(hf.adam_scale(optimizer, {"a": model.a})) == ["a"]
    assert model.b not in optimizer.state  # asking has not made one


def test_a_parameter_that_the_optimiser_has_not_is_an_error_that_says_which_to_give() -> None:
    model, optimizer, _ = trained(lambda m: Adam([m.a]), 2)
    with pytest.raises(ValueError, match="parameter 'b' is none of the optimizer's tensors"):
        hf.adam_scale(optimizer, dict(model.named_parameters()))
    _, params = hf.functionalize(model, nn.MSELoss())
    with pytest.raises(ValueError, match=r"give these themselves, as dict\(model.named_parameters\(\)\)"):
        hf.adam_scale(optimizer, params)


def test_a_zero_in_p_is_an_error() -> None:
    w = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = Adam([w], eps=0.0)
    w.square().sum().backward()
    with np.errstate(all="ignore"):
        optimizer.step()
    with pytest.raises(ValueError, match="P of the parameter has an entry that is zero"):
        hf.adam_scale(optimizer, w)


@pytest.mark.slow
def test_the_optimizer_of_accelerate_is_what_it_wraps() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = Two(torch.float32)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, Adam(model.parameters(), lr=0.05))
    for t in range(3):
        optimizer.zero_grad()
        accelerator.backward(prepared(t))
        optimizer.step()
    plain_model, plain, _ = trained(lambda m: Adam(m.parameters(), lr=0.05), 3, torch.float32)
    found = hf.adam_scale(optimizer, dict(model.named_parameters()))
    exact = hf.adam_scale(plain, dict(plain_model.named_parameters()))
    assert type(optimizer) is not Adam and all(torch.equal(found[name], exact[name]) for name in exact)
