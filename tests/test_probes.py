import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hessfn as hf
from hessfn.core import tree
from hessfn.core.probes import gaussian, rademacher

LIKE = {"w": torch.zeros(3, 5), "b": [torch.zeros(7), torch.zeros(())]}
both = pytest.mark.parametrize("draw", [rademacher, gaussian])


@both
@settings(deadline=None)
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


# Seeds that are tensors, and compilers.


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))


@both
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_seed_may_be_a_tensor_and_vmap_may_go_over_seeds(draw, dtype):
    seeds = torch.tensor([[3, 0, 250], [7, 3, 1]], dtype=dtype)
    assert same(draw(LIKE, 5, seed=seeds[0, 2])[4], draw(LIKE, 5, seed=250)[4])
    together = torch.func.vmap(torch.func.vmap(lambda seed: draw(LIKE, 5, seed=seed)[4]))(seeds)
    for i in range(2):
        for j in range(3):
            alone = draw(LIKE, 5, seed=int(seeds[i, j]))
            assert same(tree.map(lambda x: x[i, j], together), alone[4])  # noqa: B023


def test_estimates_of_several_seeds_are_those_of_each():
    diagonal = torch.linspace(-1, 2, 23).double()
    like = torch.zeros(23).double()

    def trace(seed):
        return hf.hutchinson(lambda v: diagonal * v, gaussian(like, 6, seed=seed)).mean

    together = torch.func.vmap(trace)(torch.arange(4))
    assert torch.allclose(together, torch.stack([trace(i) for i in range(4)]), rtol=1e-14)
    assert together.unique().numel() == 4


@both
def test_the_same_numbers_are_drawn_in_a_compiled_function(draw):
    compiled = torch.compile(
        lambda x: [tree.map(lambda z: z + x, probe) for probe in draw(LIKE, 4, seed=1)[1:]],
        fullgraph=True,
        backend="aot_eager",
    )
    found = compiled(torch.zeros(()))
    assert len(found) == 3 and all(same(a, b) for a, b in zip(found, list(draw(LIKE, 4, seed=1))[1:], strict=True))
    over_seeds = torch.compile(
        torch.func.vmap(lambda seed: draw(LIKE, 2, seed=seed)[0]["w"]), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(over_seeds(torch.arange(3))[2], draw(LIKE, 2, seed=2)[0]["w"])


@both
@pytest.mark.parametrize(
    ("seed", "why"),
    [
        (torch.tensor(1.0), "seed is a tensor of shape .* and torch.float32, not a whole number"),
        (torch.arange(3), "seed is a tensor of shape .3,. and torch.int64, .*vmap one at a time"),
        (torch.tensor(-1), "seed=-1 must not be negative"),
    ],
)
def test_what_is_no_seed_is_named(draw, seed, why):
    with pytest.raises(ValueError, match=why):
        draw(LIKE, 2, seed=seed)[0]
