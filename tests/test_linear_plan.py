"""What a linearized product is lowered to is kept with the trace: other values change its constants alone."""

from __future__ import annotations

import gc
from threading import Thread
from typing import Any

import pytest
import torch
from nets import classes, normal, seeded
from torch import Tensor, nn

import hessfn as hf
from hessfn.products.loss_memory import memory_of

N, WIDTH = 12, 977  # that no other test has


def of_images() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * 4, 5),
    )  # fmt: skip
    return net, normal(N, 3, 8, 8)


def of_rows() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(7, WIDTH), nn.Softplus(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)), normal(N, 7)


def problem(net: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, list[Any]]:
    """A loss, its parameters, and batches of one shape."""
    model, x = seeded(lambda: net()[0]).to(dtype).eval(), net()[1].to(dtype)
    loss, params = hf.functionalize(model, nn.CrossEntropyLoss())
    y = classes(N, 5)
    return loss, params, [(x, y), (2 * x.flip(0), y.roll(1)), (x - 1, y)]


def plans_of(loss: Any) -> list[Any]:
    (traces,) = memory_of(loss).traces.values()
    return traces[0].plans


def flat(x: Any) -> Tensor:
    return hf.tree.ravel(x)[0]


@pytest.mark.parametrize(("net", "dtype"), [(of_images, torch.float32), (of_rows, torch.float64)])
def test_products_by_a_plan_are_those_without_one_to_the_bit(net: Any, dtype: torch.dtype) -> None:
    loss, params, batches = problem(net, dtype)
    v = hf.gaussian(params, 1)[0]
    for i, batch in enumerate(batches):
        moved = {name: p * (1 + 0.1 * i) for name, p in params.items()}
        found = flat(hf.linearized_hvp(loss, moved, batch)(v))
        assert torch.equal(found, flat(hf.linearized_hvp(problem(net, dtype)[0], moved, batch)(v)))
        exact = flat(hf.hvp(loss, moved, batch, mode="double_backward")(v))
        assert (found - exact).norm() < (1e-10 if dtype == torch.float64 else 1e-3) * exact.norm()
    assert len(plans_of(loss)) == 1


def test_products_of_one_plan_have_each_its_own_memory() -> None:
    loss, params, batches = problem(of_rows)
    matvecs = [hf.linearized_hvp(loss, params, batch) for batch in batches]
    assert len(plans_of(loss)) == 1
    v = hf.gaussian(params, 1)[0]
    alone = [flat(matvec(v)) for matvec in matvecs]
    kept = [x.clone() for x in alone]
    found: dict[int, list[Tensor]] = {i: [] for i in range(len(matvecs))}

    def run(i: int) -> None:
        for _ in range(20):
            found[i].append(flat(matvecs[i](v)))

    threads = [Thread(target=run, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, products in found.items():
        assert torch.equal(alone[i], kept[i])
        assert len(products) == 20 and all(torch.equal(x, kept[i]) for x in products)


@pytest.mark.slow
def test_a_plan_keeps_no_constants() -> None:
    loss, params, batches = problem(of_rows)

    def num_alive() -> int:
        gc.collect()
        return sum(type(x) is Tensor and not x.is_meta and x.shape == (N, WIDTH) for x in gc.get_objects())

    before = num_alive()
    matvecs = [hf.linearized_hvp(loss, params, batch) for batch in batches]
    assert len(plans_of(loss)) == 1 and num_alive() > before
    matvecs.clear()
    assert num_alive() == before


def test_constants_that_vanish_for_some_data_alone_are_left_out_for_these_alone() -> None:
    """Of a root at zero there is no derivative: what others leave out as zero is nan."""
    params = {"w": normal(3)}

    def loss(params: Any, x: Tensor) -> Tensor:
        return ((x @ params["w"]).square() * x.sum(1)).sqrt().sum()

    x = normal(4, 3).abs()
    batches = [x, x * torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=x.dtype)[:, None], x + 1]
    v = hf.gaussian(params, 1)[0]
    for batch in batches:
        found = flat(hf.linearized_hvp(loss, params, batch, check=False)(v))
        fresh = flat(hf.linearized_hvp(lambda p, x: loss(p, x), params, batch, check=False)(v))
        assert torch.equal(found.nan_to_num(7.0), fresh.nan_to_num(7.0))
    assert len(plans_of(loss)) == 2


def test_a_tensor_that_the_loss_closes_over_is_that_of_now() -> None:
    loss, params, batches = problem(of_rows)
    scale = torch.ones((), dtype=torch.float64)

    def scaled(params: Any, batch: Any) -> Tensor:
        return scale * loss(params, batch)

    v = hf.gaussian(params, 1)[0]
    before = flat(hf.linearized_hvp(scaled, params, batches[0])(v))
    scale.mul_(3)
    torch.testing.assert_close(flat(hf.linearized_hvp(scaled, params, batches[0])(v)), 3 * before)
