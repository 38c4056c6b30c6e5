import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hessfn.core import tree

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
dtypes = st.sampled_from([torch.float64, torch.float32])
leaf = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)),
    shapes,
    dtypes,
    st.integers(0, 99),
)
trees = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.lists(inner, min_size=1, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3)
    ),
    max_leaves=5,
)


@given(trees)
def test_ravel_goes_there_and_back(x):
    flat, unravel = tree.ravel(x)
    assert flat.shape == (tree.numel(x),)
    for a, b in zip(tree.leaves(x), tree.leaves(unravel(flat)), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


@given(trees)
def test_unravel_takes_stacks(x):
    flat, unravel = tree.ravel(x)
    for a, b in zip(tree.leaves(x), tree.leaves(unravel(torch.stack([flat, 2 * flat]))), strict=True):
        assert torch.equal(b[0], a) and torch.equal(b[1], 2 * a)


@given(trees)
def test_dot_and_norm_are_those_of_the_flat_vector(x):
    flat = tree.ravel(x)[0].double()
    assert torch.allclose(tree.dot(x, x), flat @ flat, rtol=1e-5, atol=1e-30)
    assert torch.allclose(tree.norm(x), flat.norm(), rtol=1e-5, atol=1e-30)


@given(trees, st.floats(-2, 2))
def test_add_and_scale_are_linear_and_keep_dtypes(x, c):
    moved = tree.add(tree.scale(c, x), x, -c)
    assert all(torch.count_nonzero(leaf) == 0 for leaf in tree.leaves(moved))
    assert [a.dtype for a in tree.leaves(moved)] == [a.dtype for a in tree.leaves(x)]


@given(trees)
def test_every_leaf_has_a_name_of_its_own(x):
    assert len(set(tree.names(x))) == len(tree.leaves(x))


def test_norm_neither_overflows_nor_underflows_in_float32():
    for c in (1e-30, 1e30):
        assert torch.isclose(tree.norm({"a": torch.full((4,), c)}), torch.tensor(2 * c, dtype=torch.float64), rtol=1e-6)


def test_aligned_names_what_differs():
    like = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"missing \['b'\], unexpected \['c'\]"):
        tree.aligned({"a": torch.zeros(2), "c": torch.zeros(3)}, like)
    with pytest.raises(ValueError, match="'b' of the vector is torch.float64"):
        tree.aligned({"a": torch.zeros(2), "b": torch.zeros(3).double()}, like)
    with pytest.raises(ValueError, match="'b' of the vector is on meta"):
        tree.aligned({"a": torch.zeros(2), "b": torch.zeros(3, device="meta")}, like)
    with pytest.raises(ValueError, match="is a int, not a tensor"):
        tree.aligned({"a": torch.zeros(2), "b": 1}, like)


def test_select_says_what_there_is():
    with pytest.raises(ValueError, match="no leaf matches 'conv.*'; there are: a, b.0"):
        tree.select({"a": torch.zeros(2), "b": [torch.zeros(3)]}, "conv.*")


def test_values_are_not_asked_for_where_there_are_none():
    assert tree.known(torch.tensor(True)) is True
    assert tree.known(torch.tensor(True, device="meta")) is None
    asked = []
    torch.func.vmap(lambda x: (asked.append(tree.known(x > 0)), x)[1])(torch.ones(2))
    assert asked == [None]
