import pytest
import torch
from nets import normal, problem

from hessfn.core import tree
from hessfn.landscape.directions import gradient_direction
from hessfn.landscape.slices import plane
from hessfn.landscape.trajectory import principal_directions

LIKE = {"a": normal(3, 4), "b": [normal(2, seed=2), normal(1, seed=3)[0]]}


def path(num, like=LIKE, seed=7):
    flat, unravel = tree.ravel(like)
    return [unravel(row) for row in normal(num, len(flat), seed=seed).cumsum(0)]


def flat(x):
    return tree.ravel(x)[0]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_principal_directions_are_the_singular_vectors_of_the_displacements(k):
    checkpoints = path(6)
    found = principal_directions(checkpoints, k)
    rows = torch.stack([flat(p) - flat(checkpoints[-1]) for p in checkpoints])
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    ours = torch.stack([flat(d) for d in found.directions])
    signs = (ours * vh[:k]).sum(1).sign()
    assert torch.allclose(ours, signs[:, None] * vh[:k])
    assert torch.allclose(found.coordinates, u[:, :k] * s[:k] * signs)
    assert torch.allclose(found.fractions, s[:k].square() / s.square().sum())
    assert (found.coordinates.gather(0, found.coordinates.abs().argmax(0)[None]) > 0).all()


def test_all_directions_give_the_checkpoints_back():
    checkpoints = path(5)
    directions, coordinates, fractions = principal_directions(checkpoints, k=4)
    for point, coordinate in zip(checkpoints, coordinates, strict=True):
        back = checkpoints[-1]
        for direction, c in zip(directions, coordinate, strict=True):
            back = tree.add(back, direction, c)
        assert torch.allclose(flat(back), flat(point))
    assert torch.allclose(fractions.sum(), torch.tensor(1.0).double())


def test_another_origin_moves_the_plane():
    checkpoints = path(4)
    found = principal_directions(checkpoints, k=2, origin=checkpoints[0])
    assert torch.allclose(found.coordinates[0], torch.zeros(2).double(), atol=1e-12)


def test_neither_the_tree_nor_the_length_of_a_leaf_matters(monkeypatch):
    checkpoints = path(5)
    whole = principal_directions(checkpoints)
    monkeypatch.setattr("hessfn.landscape.trajectory.CHUNK", 5)
    for others in (checkpoints, [flat(p) for p in checkpoints]):
        found = principal_directions(others)
        assert torch.allclose(found.coordinates, whole.coordinates)
        assert all(torch.allclose(flat(x), flat(y)) for x, y in zip(found.directions, whole.directions, strict=True))


def test_directions_come_in_the_dtypes_of_the_checkpoints_and_from_files(tmp_path):
    mixed = {"half": torch.zeros(3, dtype=torch.bfloat16), "single": torch.zeros(4)}
    checkpoints = [tree.map(lambda x, p=p: p[: len(x)].to(x.dtype), mixed) for p in normal(4, 4)]
    for i, checkpoint in enumerate(checkpoints):
        torch.save(checkpoint, tmp_path / f"{i}.pt")
    from_files = [torch.load(tmp_path / f"{i}.pt", mmap=True) for i in range(4)]
    found = principal_directions(from_files)
    assert {name: x.dtype for name, x in found.directions[0].items()} == {name: x.dtype for name, x in mixed.items()}
    assert torch.equal(found.coordinates, principal_directions(checkpoints).coordinates)


def test_descent_on_a_plane_is_seen_on_that_plane():
    """The losses at a trajectory's coordinates are its own, where it stays in a plane."""
    loss, params, batch, _ = problem("mlp")
    along, across = gradient_direction(loss, params, batch), path(1, params)[0]
    steps = [(0.0, 0.0), (1.0, 0.2), (1.5, 0.5), (2.0, 0.6)]
    checkpoints = [tree.add(tree.add(params, along, -x), across, y) for x, y in steps]
    directions, coordinates, fractions = principal_directions(checkpoints)
    assert fractions.sum() > 1 - 1e-12
    for point, (x, y) in zip(checkpoints, coordinates, strict=True):
        seen = plane(loss, checkpoints[-1], directions, x[None], y[None], batch)
        assert torch.allclose(seen[0, 0], loss(point, batch))


def test_bad_input_is_named():
    checkpoints = path(3)
    with pytest.raises(ValueError, match="k=3 must be between 1 and 2, .* these 3 checkpoints span"):
        principal_directions(checkpoints, k=3)
    with pytest.raises(ValueError, match="k=1 must be between 1 and 0"):
        principal_directions(checkpoints[:1], k=1)
    with pytest.raises(ValueError, match="no checkpoint"):
        principal_directions([])
    with pytest.raises(ValueError, match="'a' of checkpoint 1 has shape"):
        principal_directions([LIKE, {**LIKE, "a": normal(2)}, LIKE])
