import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hessfn.core import tree
from hessfn.core.probes import gaussian, rademacher

LIKE = {"w": torch.zeros(3, 5), "b": [torch.zeros(7), torch.zeros(())]}
both = pytest.mark.parametrize("draw", [rademacher, gaussian])


@both
@given(seed=st.integers(0, 2**63), index=st.integers(0, 9))
def test_an_entry_is_a_function_of_seed_and_index_alone(draw, seed, index):
    one = tree.ravel(draw(LIKE, 10, seed=seed)[index])[0]
    assert torch.equal(one, draw(torch.zeros(23), 100, seed=seed)[index]), "whatever the tree"
    assert torch.equal(one, tree.ravel(list(draw(LIKE, 10, seed=seed))[index])[0]), "and however it is asked for"
    assert torch.equal(one, tree.ravel(draw(LIKE, 10, seed=seed)[index:][0])[0])


@both
def test_seeds_indices_and_kinds_are_independent(draw):
    long = torch.zeros(20000)
    drawn = [draw(long, 2, seed=0)[0], draw(long, 2, seed=0)[1], draw(long, 2, seed=1)[0], gaussian(long, 1, seed=5)[0]]
    drawn.append(rademacher(long, 1, seed=5)[0])
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(5)
    assert correlation.abs().max() < 5 / 20000**0.5


def test_moments():
    signs, normals = (draw(torch.zeros(40000), 1)[0] for draw in (rademacher, gaussian))
    assert torch.equal(signs.abs(), torch.ones(40000)) and abs(signs.mean()) < 4 / 200
    assert abs(normals.mean()) < 4 / 200 and abs(normals.var() - 1) < 4 * 2**0.5 / 200
    assert abs((normals**4).mean() - 3) < 4 * 96**0.5 / 200


@both
def test_dtypes_and_devices_are_those_of_the_leaves(draw):
    like = {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(2).half(), "c": torch.zeros(2, device="meta")}
    for x, wanted in zip(tree.leaves(draw(like, 1)[0]), tree.leaves(like), strict=True):
        assert x.dtype == wanted.dtype and x.device == wanted.device
    wide = draw(torch.zeros(9, dtype=torch.float64), 1)[0]
    assert torch.equal(wide.float(), draw(torch.zeros(9), 1)[0])


@both
def test_the_global_generator_is_left_alone(draw):
    before = torch.get_rng_state()
    draw(LIKE, 3)[2]
    assert torch.equal(before, torch.get_rng_state())


@both
def test_bad_input_is_named(draw):
    with pytest.raises(ValueError, match="num=-1"):
        draw(LIKE, -1)
    with pytest.raises(ValueError, match="leaf 'ids' of like is torch.int64"):
        draw({"ids": torch.zeros(3, dtype=torch.long)}, 1)
    with pytest.raises(IndexError):
        draw(LIKE, 3)[3]
