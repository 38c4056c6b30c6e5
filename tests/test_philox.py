"""The numbers behind the probes: NumPy's words, exact arithmetic, and the normal distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch.utils._python_dispatch import TorchDispatchMode

from hessfn.core import philox, probes, tree
from hessfn.core.probes import gaussian, rademacher

CPU = torch.device("cpu")
both = pytest.mark.parametrize("draw", [rademacher, gaussian])


@settings(deadline=None, max_examples=30)
@given(entropy=st.lists(st.integers(0, 2**70), min_size=1), first=st.integers(0, 2**40), count=st.integers(0, 9))
def test_words_are_those_of_numpy(entropy, first, count):
    numpys = np.random.Philox(np.random.SeedSequence(entropy))
    numpys.advance(first)
    expected = numpys.random_raw(4 * count).view(np.int64)
    key = philox.key_of(entropy)
    assert np.array_equal(philox.words(key, first, first + count, CPU), expected)
    assert np.array_equal(philox.computed_words(key, first, first + count, CPU), expected), "as a device computes them"


def test_signs_are_the_bits_of_numpy():
    entropy = [7, 3, *b"_signs"]
    stream = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).bytes(1250)
    expected = 2.0 * np.unpackbits(np.frombuffer(stream, np.uint8)) - 1
    assert np.array_equal(rademacher(torch.zeros(10_000), 4, seed=7)[3], expected)


def test_normals_are_those_of_box_and_muller():
    extremes = torch.tensor([0, -1, 2**32 - 1, -(2**32), 2**62, -(2**63), 2**62 - 1, 2**31, -(2**62)])
    words = torch.cat([philox.words((3, 4), 0, 5000, CPU), extremes])
    wide = words.numpy().view(np.uint64)
    u = ((wide & 0xFFFFFFFF).astype(np.longdouble) + 0.5) / 2**32
    angle = ((wide >> 32 & 0x3FFFFFFF).astype(np.longdouble) + 0.5) / 2**30 * np.arccos(np.longdouble(0))
    pair = np.sqrt(-2 * np.log(u)) * np.stack([np.cos(angle), np.sin(angle)])
    sign = 1 - 2 * np.stack([wide >> 63, wide >> 62 & 1]).astype(np.longdouble)
    found = philox.normals(words).numpy()
    assert np.abs(found - (pair * sign).T.ravel()).max() < 1e-14
    assert np.isfinite(found).all() and 6.7 < np.abs(found).max() < 6.8


# The same bits on every device.


@both
def test_a_device_computes_what_the_cpu_takes_from_numpy(draw, monkeypatch):
    like = {"w": torch.zeros(300, 7), "b": torch.zeros(5).half(), "c": torch.zeros(41).double()}
    expected = draw(like, 5, seed=2)[4]
    monkeypatch.setattr(philox, "words", philox.computed_words)
    assert all(torch.equal(expected[name], x) for name, x in draw(like, 5, seed=2)[4].items())


class Seen(TorchDispatchMode):
    """The operations that run, and the bytes of the largest tensor that they make."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names.add(name if name.startswith("__") else name.rstrip("_"))
        assert "alpha" not in (kwargs or {}), "a product and a sum, which a device may round once or twice"
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


ROUNDED_ONCE = {"add", "sub", "rsub", "mul", "div", "sqrt", "copysign", "_to_copy"}
WHOLE_NUMBERS = {"arange", "__and__", "__lshift__", "__rshift__", "__xor__", "bitwise_and", "bitwise_right_shift"}
WHOLE_NUMBERS |= {"bitwise_xor", "bitwise_or"}
MOVED = {"empty", "view", "slice", "select", "stack", "unsqueeze", "copy", "detach"}


@both
def test_only_operations_that_every_device_rounds_alike(draw, monkeypatch):
    monkeypatch.setattr(philox, "words", philox.computed_words)
    drawn = draw(torch.zeros(3000), 1)
    with Seen() as seen:
        drawn[0]
    assert seen.names <= ROUNDED_ONCE | WHOLE_NUMBERS | MOVED, "and none that waits for a number"


@both
def test_nothing_but_the_tree_is_large(draw):
    drawn = draw(torch.zeros(2_000_000).half(), 1)
    with Seen() as seen:
        drawn[0]
    assert seen.largest == 4_000_000


@both
def test_chunks_and_threads_change_nothing(draw, monkeypatch):
    sizes = [0, 3, 700, 1, 1, 2000, 255, 257, 130]
    like = [torch.zeros(size) for size in sizes]
    whole = draw(torch.zeros(sum(sizes)), 1, seed=5)[0]
    for chunk in (256, 512, 2**17):
        monkeypatch.setattr(probes, "_CHUNK", chunk)
        assert torch.equal(tree.ravel(draw(like, 1, seed=5)[0])[0], whole)
    threads, wide = torch.get_num_threads(), torch.zeros(300_000)
    one = draw(wide, 1)[0]
    try:
        torch.set_num_threads(3)
        assert torch.equal(draw(wide, 1)[0], one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_leaves_are_rounded(dtype):
    exact, narrow = (gaussian(torch.zeros(5000, dtype=t), 1)[0] for t in (torch.float64, dtype))
    assert (narrow.double() - exact).abs().le(exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-7).all()


# The distribution: each bound is passed by chance once in 10,000 choices of the seed, or less often.


def z_scores_of_moments(sums, n):
    """Of the raw moments 1 to 6; those of N(0, 1) are 0, 1, 0, 3, 0, 15."""
    exact = [0 if k % 2 else special.factorial2(k - 1) for k in range(13)]
    return [(sums[k - 1] / n - exact[k]) / math.sqrt((exact[2 * k] - exact[k] ** 2) / n) for k in range(1, 7)]


def test_normals_are_normal():
    z = gaussian(torch.zeros(1_000_000).double(), 1, seed=1)[0].numpy()
    assert stats.kstest(z[:200_000], stats.norm.cdf).pvalue > 1e-4
    assert stats.kstest(z[::2][-200_000:], stats.norm.cdf).pvalue > 1e-4
    assert np.abs(z_scores_of_moments([(z**k).sum() for k in range(1, 7)], len(z))).max() < 4.5
    for sigma in (3, 4):
        expected = 2 * stats.norm.sf(sigma) * len(z)
        assert abs((np.abs(z) > sigma).sum() - expected) < 4 * expected**0.5 + 1


@pytest.mark.slow
def test_a_hundred_million_normals_are_normal():
    n, edges = 0, stats.norm.ppf(np.arange(1, 200) / 200)
    bins, tails, sums = np.zeros(200), np.zeros(3), np.zeros(6)
    for probe in gaussian(torch.zeros(2_000_000).double(), 50, seed=2):
        z = probe.numpy()
        bins += np.bincount(np.searchsorted(edges, z), minlength=200)
        tails += [(np.abs(z) > sigma).sum() for sigma in (3, 4, 5)]
        power = np.ones_like(z)
        for k in range(6):
            power *= z
            sums[k] += power.sum()
        n += len(z)
    assert stats.chisquare(bins).pvalue > 1e-4
    assert np.abs(z_scores_of_moments(sums, n)).max() < 4.5
    expected = 2 * stats.norm.sf([3, 4, 5]) * n
    assert (np.abs(tails - expected) < 4 * expected**0.5).all()


@both
def test_neighbours_are_independent(draw):
    n = 200_000
    z = draw(torch.zeros(n).double(), 1, seed=3)[0]
    quantities = [z] if draw is rademacher else [z, z**2 - 1, z**3]  # those of signs are constant
    for a in quantities:
        for b in quantities:
            for lag in (1, 2, 3, 4, 7, 8, 16, 64, 256):
                score = (a[:-lag] * b[lag:]).sum() / ((a**2).mean() * (b**2).mean() * n).sqrt()
                assert abs(score) < 5
    # The two of a pair have the radius in common, and neither knows the other.
    if draw is gaussian:
        counts = torch.histogramdd(z.view(-1, 2).clamp(-2.99, 2.99), bins=[6, 6], range=[-3.0, 3.0, -3.0, 3.0]).hist
        p = np.diff([0, *stats.norm.cdf([-2, -1, 0, 1, 2]), 1])
        assert stats.chisquare(counts.numpy().ravel(), (np.outer(p, p) * n / 2).ravel()).pvalue > 1e-4
