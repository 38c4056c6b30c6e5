import pytest
import torch
from nets import normal, problem

from hessfn import tree
from hessfn.curvature import hvp
from hessfn.landscape import filter_normalized, gradient_direction, line, plane, random_direction


@pytest.mark.parametrize("net", ["mlp", "conv", "layer_norm", "attention"])
def test_curvature_of_a_slice_is_that_of_the_product(net):
    loss, params, batch, _ = problem(net)
    v = random_direction(params, seed=3)
    h = 1e-3
    below, middle, above = line(loss, params, v, [-h, 0.0, h], batch)
    assert torch.allclose((above - 2 * middle + below) / h**2, tree.dot(v, hvp(loss, params, batch)(v)), rtol=1e-4)


def test_slope_along_the_gradient_is_its_norm():
    loss, params, batch, _ = problem("mlp")
    h = 1e-5
    below, above = line(loss, params, gradient_direction(loss, params, batch), [-h, h], batch)
    assert torch.allclose((above - below) / (2 * h), tree.norm(torch.func.grad(loss)(params, batch)), rtol=1e-8)


def test_a_plane_is_made_of_lines():
    loss, params, batch, _ = problem("mlp")
    directions = random_direction(params, seed=0), random_direction(params, seed=1)
    x, y = torch.linspace(-1, 1, 3), [0.0, 0.5]
    grid = plane(loss, params, directions, x, y, batch)
    assert grid.shape == (3, 2)
    assert torch.allclose(grid[:, 0], line(loss, params, directions[0], x, batch))
    assert torch.allclose(grid[1], line(loss, params, directions[1], y, batch))


def test_filters_of_a_normalised_direction_are_as_long_as_those_of_the_net():
    params = {"w": normal(4, 3, 2), "b": normal(4), "dead": torch.zeros(2, 2).double()}
    d = filter_normalized(random_direction(params), params)
    assert torch.allclose(d["w"].flatten(1).norm(dim=1), params["w"].flatten(1).norm(dim=1))
    assert not d["b"].any() and not d["dead"].any()


def test_bad_input_is_named():
    loss, params, batch, _ = problem("mlp")
    with pytest.raises(ValueError, match="the direction is a tree of other leaves"):
        line(loss, params, {"a": torch.zeros(1)}, [0.0], batch)
    with pytest.raises(ValueError, match="norm 0.0"):
        gradient_direction(lambda w: (w * 0).sum(), torch.ones(3))
