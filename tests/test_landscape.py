import pytest
import torch
from nets import dense_hessian, normal, problem

from hessfn.core import tree
from hessfn.estimators.eigen import eigsh
from hessfn.landscape.directions import direction_to, filter_normalized, gradient_direction, random_direction
from hessfn.landscape.slice_check import check_slice, slice_curvature
from hessfn.landscape.slices import line, plane
from hessfn.losses import batches
from hessfn.products.hessian import hvp, mean_hvp
from hessfn.transforms.progress_bar import progress


@pytest.mark.parametrize("net", ["mlp", "conv", "batch_norm", "layer_norm", "attention", "lstm"])
def test_curvature_of_a_slice_is_that_of_the_product(net):
    loss, params, batch, _ = problem(net)
    matvec = hvp(loss, params, batch)
    for v in (random_direction(params, seed=3), gradient_direction(loss, params, batch)):
        value, error = slice_curvature(loss, params, v, batch)
        assert error <= 1e-6 * value.abs()
        assert (value - tree.dot(v, matvec(v))).abs() <= 10 * error
        check_slice(matvec, loss, params, v, batch)


def test_curvature_along_an_eigenvector_is_the_eigenvalue():
    loss, params, batch, _ = problem("mlp")
    eig = eigsh(hvp(loss, params, batch), random_direction(params), k=2, which="BE", rtol=1e-8)
    for i, value in enumerate(eig.values):
        found = slice_curvature(loss, params, tree.map(lambda leaf, i=i: leaf[i], eig.vectors), batch)
        assert torch.allclose(found.value, value, rtol=1e-6)


def test_slices_tell_the_hessian_of_the_data_from_that_of_a_part():
    loss, params, (x, y), _ = problem("mlp")
    ragged = [(x[:4], y[:4]), (x[4:], y[4:])]
    v = gradient_direction(loss, params, (x, y))
    matvec = mean_hvp(loss, params, ragged)
    check_slice(matvec, batches.mean(loss, ragged), params, v)
    with pytest.raises(ValueError, match="not the Hessian of this loss"):
        check_slice(matvec, loss, params, v, ragged[0])


def test_a_flat_slice_tells_nothing():
    with pytest.raises(ValueError, match="too inexact to tell"):
        check_slice(torch.zeros_like, lambda w: w.sum().sin() * 0 + (w * 0.3).sum(), normal(3), normal(3, seed=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_bend_as_they_should_from_parameters_of_zero_too(dtype):
    value, error = slice_curvature(
        lambda w: (w.cos() * 3).sum(), torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
    )
    assert (value + 12).abs() <= 4 * error and error <= torch.finfo(dtype).eps ** (1 / 3) * 12


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


def test_a_plane_of_a_quadratic_is_the_quadratic_form():
    loss, params, batch, _ = problem("mlp")
    flat, unravel = tree.ravel(params)
    hessian = dense_hessian(loss, params, batch)
    rows = normal(2, len(flat), seed=5)
    x, y = torch.linspace(-2, 1, 4).double(), torch.linspace(-1, 3, 3).double()
    grid = plane(
        lambda p: tree.dot(p, unravel(hessian @ tree.ravel(p)[0])) / 2, params, tuple(map(unravel, rows)), x, y
    )
    at = flat + x[:, None, None] * rows[0] + y[None, :, None] * rows[1]
    assert torch.allclose(grid, torch.einsum("xyi,ij,xyj->xy", at, hessian, at) / 2)


@pytest.mark.parametrize("net", ["conv", "batch_norm", "layer_norm", "attention"])
@pytest.mark.parametrize("batch_size", [2, 3, 100])
def test_points_at_once_are_points_one_by_one(net, batch_size):
    loss, params, batch, model = problem(net)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    directions = random_direction(params, seed=0), random_direction(params, seed=1)
    steps = torch.linspace(-1, 1, 4).double()
    one_by_one = plane(loss, params, directions, steps, steps[:2], batch)
    assert torch.allclose(plane(loss, params, directions, steps, steps[:2], batch, batch_size=batch_size), one_by_one)
    together = line(loss, params, directions[0], steps, batch, batch_size=batch_size)
    assert torch.allclose(together, line(loss, params, directions[0], steps, batch))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_over_batches_it_is_the_landscape_of_all_data(batch_size):
    loss, params, (x, y), _ = problem("mlp")
    ragged = [(x[:4], y[:4]), (x[4:], y[4:])]
    directions, steps = (random_direction(params, seed=0), random_direction(params, seed=1)), [-1.0, 0.0, 2.0]
    whole = plane(loss, params, directions, steps, steps, (x, y))
    assert torch.allclose(
        plane(batches.mean(loss, ragged), params, directions, steps, steps, batch_size=batch_size), whole
    )
    each_read_once = batches.mean(lambda batch: plane(loss, params, directions, steps, steps, batch), ragged)
    assert torch.allclose(each_read_once(), whole)


def test_a_landscape_composes_with_vmap_and_grad():
    loss, params, (x, y), _ = problem("mlp")
    v, steps = random_direction(params), torch.tensor([-0.5, 0.0, 1.0])
    stacked = (torch.stack([x, 2 * x]), torch.stack([y, y]))
    looped = torch.stack([line(loss, params, v, steps, (x, y)), line(loss, params, v, steps, (2 * x, y))])
    assert torch.allclose(torch.func.vmap(lambda *batch: line(loss, params, v, steps, batch))(*stacked), looped)
    gradient = torch.func.grad(lambda p: line(loss, p, v, steps, (x, y), batch_size=3).sum())(params)
    expected = [torch.func.grad(loss)(tree.add(params, v, s), (x, y)) for s in steps]
    assert torch.allclose(tree.ravel(gradient)[0], sum(tree.ravel(g)[0] for g in expected))


def test_a_loss_that_holds_live_parameters_leaves_no_graph():
    live = normal(3).requires_grad_()
    assert not line(lambda w: (w * live).sum(), normal(3), normal(3), [0.0, 1.0]).requires_grad


def test_a_line_to_a_checkpoint_ends_there_and_a_plane_meets_three():
    loss, a, batch, _ = problem("mlp")
    b, c = (tree.add(a, random_direction(a, seed=s), 3.0) for s in (0, 1))
    at_a, at_b, at_c = (loss(p, batch) for p in (a, b, c))
    assert torch.allclose(line(loss, a, direction_to(a, b), [0, 1], batch), torch.stack([at_a, at_b]))
    corners = plane(loss, a, (direction_to(a, b), direction_to(a, c)), [0, 1], [0, 1], batch)
    assert torch.allclose(corners[[0, 1, 0], [0, 0, 1]], torch.stack([at_a, at_b, at_c]))


NESTED = {"conv": normal(4, 3, 2, 2), "deep": [normal(5, 3, seed=3), normal(4, seed=4)], "scale": normal(1)[0]}
NESTED["dead"] = torch.zeros(2, 2).double()


def lengths(x):
    return torch.linalg.vector_norm(x.flatten(1), dim=1) if x.dim() > 1 else torch.linalg.vector_norm(x)


def test_filters_of_a_normalised_direction_are_as_long_as_those_of_the_net():
    d = filter_normalized(random_direction(NESTED), NESTED)
    for name in ("conv", "dead"):
        assert torch.allclose(lengths(d[name]), lengths(NESTED[name]))
    assert torch.allclose(lengths(d["deep"][0]), lengths(NESTED["deep"][0]))
    assert not d["deep"][1].any() and not d["scale"].any()


def test_vectors_that_are_kept_are_one_filter_each_and_point_where_they_did():
    random = random_direction(NESTED)
    d = filter_normalized(random, NESTED, keep_vectors=True)
    for kept, ours, theirs in (
        (d["deep"][1], random["deep"][1], NESTED["deep"][1]),
        (d["scale"], random["scale"], NESTED["scale"]),
    ):
        assert torch.allclose(lengths(kept), lengths(theirs)) and kept.shape == theirs.shape
        assert torch.allclose(kept / lengths(kept), ours / lengths(ours))
    assert torch.equal(d["conv"], filter_normalized(random, NESTED)["conv"])


def test_a_normalised_slice_does_not_depend_on_the_scale_of_a_net():
    x, weights = normal(6, 4), {"first": normal(5, 4, seed=2), "second": normal(3, 5, seed=3)}
    rescaled = {"first": 10 * weights["first"], "second": weights["second"] / 10}

    def relu_net(w):
        return ((x @ w["first"].T).relu() @ w["second"].T).square().mean()

    def slices(*normalised):
        return [line(relu_net, w, d, [-1.0, 0.5, 1.0]) for w, d in zip((weights, rescaled), normalised, strict=True)]

    random = random_direction(weights)
    assert torch.allclose(*slices(filter_normalized(random, weights), filter_normalized(random, rescaled)))
    assert not torch.allclose(*slices(random, random), rtol=0.1)


def test_progress_of_a_plane_counts_points_and_estimates_the_time(capsys):
    loss, params, batch, _ = problem("mlp")
    directions = random_direction(params, seed=0), random_direction(params, seed=1)
    counted = progress(loss, total=4 * 3, desc="plane", unit="point")
    grid = plane(counted, params, directions, range(4), range(3), batch)
    assert torch.equal(grid, plane(loss, params, directions, range(4), range(3), batch))
    said = capsys.readouterr().err
    assert "plane: 100%" in said and "12/12 [" in said and "point/s" in said and "<" in said  # time spent < time left


def test_bad_input_is_named():
    loss, params, batch, _ = problem("mlp")
    with pytest.raises(ValueError, match="the direction is a tree of other leaves"):
        line(loss, params, {"a": torch.zeros(1)}, [0.0], batch)
    with pytest.raises(ValueError, match="leaf '0.bias' of the second direction is torch.float32"):
        plane(loss, params, (params, {**params, "0.bias": params["0.bias"].float()}), [0.0], [0.0], batch)
    with pytest.raises(ValueError, match=r"at least one, not of shape \(0,\)"):
        line(loss, params, params, [], batch)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        line(loss, params, params, [0.0], batch, batch_size=0)
    with pytest.raises(ValueError, match="norm 0.0"):
        gradient_direction(lambda w: (w * 0).sum(), torch.ones(3))
