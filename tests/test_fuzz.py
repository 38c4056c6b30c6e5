"""Random matrices, nets, trees, dtypes and options: every call tells the truth within its error, or what is wrong.

``python tests/test_fuzz.py 600`` goes on for so many seconds and counts the calls.
"""

import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from nets import CRITERIA, NETS, dense_hessian, problem

import hessfn as hf
from hessfn.core import tree

CALLS: Counter[str] = Counter()
REFUSED: Counter[str] = Counter()
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
COUNTS = st.integers(-1, 12)


@st.composite
def likes(draw, dtype):
    """A tree of zeros, in which scalars and empty leaves may be."""
    leaf = st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.zeros(shape, dtype=dtype))
    several = st.recursive(leaf, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.sampled_from("abc"), t))
    return draw(several.filter(lambda t: 1 <= tree.numel(t) <= 24))


@st.composite
def matrices(draw, n):
    rng = np.random.default_rng(draw(SEEDS))
    normal, i = rng.standard_normal(n), np.arange(n)
    kinds = {
        "random": normal,
        "low rank": normal * (i < 2),
        "clustered": np.sign(normal) + 1e-3 * i,
        "decaying": 10.0**-i,
        "identity": np.ones(n),
        "zero": np.zeros(n),
    }
    q = np.linalg.qr(rng.standard_normal((n, n)))[0] if draw(st.booleans()) else np.eye(n)
    return torch.from_numpy((q * kinds[draw(st.sampled_from(sorted(kinds)))]) @ q.T)


def at_most(smaller, larger):
    smaller, larger = torch.as_tensor(smaller), torch.as_tensor(larger)
    assert smaller.isfinite().all() and (smaller <= larger).all(), (smaller, larger)


def flat(vectors):
    return torch.cat([leaf.reshape(len(leaf), leaf[0].numel()).double() for leaf in tree.leaves(vectors)], dim=1)


class Fuzz(RuleBasedStateMachine):
    """The state is a matvec, a tree like its vectors, and its matrix. Rules replace it, or ask about it."""

    @initialize(data=st.data(), dtype=DTYPES)
    def of_a_matrix(self, data, dtype):
        like = data.draw(likes(dtype))
        scale = 1.0 if dtype == torch.float16 else data.draw(st.sampled_from([1.0, 2.0**-90, 2.0**90]))
        matrix = scale * data.draw(matrices(tree.numel(like)))
        unravel = tree.ravel(like)[1]
        self.settle(lambda v: unravel(matrix @ tree.ravel(v)[0].double()), like, matrix)

    @rule(
        net=st.sampled_from(sorted(NETS)),
        criterion=st.sampled_from(sorted(CRITERIA)),
        seed=st.integers(0, 9),
        dtype=st.sampled_from([torch.float64, torch.float32]),
        make=st.sampled_from(["hvp", "forward", "reverse", "linearized_hvp", "mean_hvp"]),
    )
    def of_a_net(self, net, criterion, seed, dtype, make):
        assume(make != "forward" or criterion != "mse")  # its loss has no forward rule, as the error says
        loss, params, batch, model = problem(net, criterion, seed)
        last = {name: params[name] for name in list(params)[-2:]}
        exact = dense_hessian(lambda p, b: loss({**params, **p}, b), last, batch)
        loss, params = hf.functionalize(model.to(dtype), CRITERIA[criterion][0], params=list(last))
        batch = tree.map(lambda x: x.to(dtype) if x.is_floating_point() else x, batch)
        halves = [tree.map(lambda x: x[:1], batch), tree.map(lambda x: x[1:], batch)]
        matvec = {
            "hvp": lambda: hf.hvp(loss, params, batch),
            "forward": lambda: hf.hvp(loss, params, batch, mode="forward"),
            "reverse": lambda: hf.hvp(loss, params, batch, mode="reverse"),
            "linearized_hvp": lambda: hf.linearized_hvp(loss, params, batch),
            "mean_hvp": lambda: hf.mean_hvp(loss, params, halves),
        }[make]()
        found = hf.dense(matvec, params).double()
        size = torch.linalg.matrix_norm(exact)
        at_most(torch.linalg.matrix_norm(found - exact), torch.finfo(dtype).eps ** 0.7 * size.clamp(min=1))
        self.settle(matvec, params, (found + found.T) / 2, float(torch.linalg.matrix_norm(found - found.T)))
        hf.check_matvec(matvec, params)
        CALLS[make] += 1

    @rule(data=st.data())
    def of_some_leaves(self, data):
        names = dict(zip(tree.names(self.like), tree.leaves(self.like), strict=True))
        full = [name for name, leaf in names.items() if leaf.numel()]
        chosen = data.draw(st.lists(st.sampled_from(full), min_size=1, unique=True))
        kept = torch.cat([torch.full((leaf.numel(),), name in chosen) for name, leaf in names.items()])
        matvec = hf.restrict(self.matvec, self.like, chosen)
        self.settle(matvec, tree.select(self.like, chosen), self.matrix[kept][:, kept], self.slack)
        CALLS["restrict"] += 1

    @rule(seed=SEEDS)
    def outside_of_a_vector(self, seed):
        vector = self.start(seed)
        q = tree.ravel(vector)[0].double()
        q = q / torch.linalg.vector_norm(q)
        outside = torch.eye(len(q)).double() - torch.outer(q, q)
        matvec = hf.deflate(self.matvec, tree.map(lambda x: x[None], vector))
        self.settle(matvec, self.like, outside @ self.matrix @ outside, self.slack)

    def settle(self, matvec, like, matrix, slack=0.0):
        self.matvec, self.like, self.matrix, self.n = matvec, like, matrix, len(matrix)
        self.eps = max(torch.finfo(leaf.dtype).eps for leaf in tree.leaves(like))
        self.size = float(torch.linalg.matrix_norm(matrix))
        self.slack = slack + 40 * self.n * self.eps * self.size

    def start(self, seed):
        return hf.gaussian(self.like, 1, seed=seed)[0]

    def call(self, name, function, valid, *values, **options):
        """The result; or None, where the arguments are not valid and the refusal names one of the values."""
        CALLS[name] += 1
        if valid:
            return function(self.matvec, *values, **options)
        REFUSED[name] += 1
        with pytest.raises((ValueError, TypeError), match=r"\d|no probe|which=|rtol=None"):
            function(self.matvec, *values, **options)
        return None

    def pairs(self, values, vectors, residuals):
        q = flat(vectors)
        exact = torch.linalg.vector_norm(q @ self.matrix - values[:, None] * q, dim=1)
        at_most((exact - residuals).abs(), 0.05 * residuals + self.slack)
        at_most(
            (q @ q.T - torch.eye(len(q)).double()).abs(), 40 * self.n * max(self.eps, 1e-7 if self.eps > 1e-15 else 0)
        )
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        at_most((eigenvalues[:, None] - values).abs().min(0).values, residuals + self.slack)

    @rule(
        k=COUNTS,
        which=st.sampled_from(["LM", "LA", "SA", "BE", "XX"]),
        rtol=st.sampled_from([1e-3, 1e-1, None]),
        basis_size=st.none() | COUNTS,
        max_matvecs=st.none() | st.integers(-1, 40),
        seed=SEEDS,
    )
    def eigsh(self, k, which, rtol, basis_size, max_matvecs, seed):
        n = self.n
        options = {"which": which, "rtol": rtol, "basis_size": basis_size, "max_matvecs": max_matvecs}
        valid = 1 <= k <= n and which != "XX"
        if rtol is None:
            valid = valid and max_matvecs is not None and min(max_matvecs, n) >= k
        else:
            valid = valid and (basis_size is None or basis_size >= min(n, k + 2))
            valid = valid and (max_matvecs is None or max_matvecs > k)
        found = self.call("eigsh", hf.eigsh, valid, self.start(seed), k, **options)
        if found is None:
            return
        assert found.num_matvecs <= (max_matvecs or 10 * n + 10 * (2 * k + 20))
        order = {"LM": -found.values.abs(), "LA": -found.values, "SA": found.values, "BE": found.values}[which]
        assert (order.diff() >= 0).all()
        self.pairs(found.values, found.vectors, found.residuals)
        limit = (rtol or 1e-3) * found.values.abs() + self.slack
        at_most(found.residuals[found.converged], limit[found.converged])

    @rule(max_matvecs=st.integers(-1, 30), rtol=st.sampled_from([None, 1e-2]), seed=SEEDS)
    def power_iter(self, max_matvecs, rtol, seed):
        options = {"max_matvecs": max_matvecs, "rtol": rtol}
        found = self.call("power_iter", hf.power_iter, max_matvecs >= 1, self.start(seed), **options)
        if found is not None:
            self.pairs(found.value[None], tree.map(lambda x: x[None], found.vector), found.residual[None])

    @rule(m=COUNTS, seed=SEEDS)
    def lanczos(self, m, seed):
        found = self.call("lanczos", hf.lanczos, 1 <= m <= self.n, self.start(seed), m)
        if found is not None and self.eps < 1e-3:
            q = flat(found.basis)
            t = torch.diag(found.alpha) + torch.diag(found.beta, 1) + torch.diag(found.beta, -1)
            rest = torch.zeros_like(q)
            rest[-1] = tree.ravel(found.residual)[0]
            at_most((q @ self.matrix - t @ q - rest).abs(), self.slack)
            at_most((q @ q.T - torch.eye(m).double()).abs(), 40 * self.n * self.eps)

    @rule(num=COUNTS, signs=st.booleans(), seed=SEEDS)
    def hutchinson(self, num, signs, seed):
        if num < 0:
            num = 0
        probes = (hf.rademacher if signs else hf.gaussian)(self.like, num, seed=seed)
        found = self.call("hutchinson", hf.hutchinson, num > 0, probes)
        leaves = self.call("hutchinson_per_leaf", hf.hutchinson_per_leaf, num > 0, probes)
        diagonal = self.call("hutchinson_diag", hf.hutchinson_diag, num > 0, probes)
        if found is None:
            return
        z = torch.stack([tree.ravel(probe)[0].double() for probe in probes])
        products = z * (z @ self.matrix)
        slack = 20 * self.slack
        at_most((found.mean - products.sum(1).mean()).abs(), slack)
        at_most((torch.stack(tree.leaves(leaves.mean)).sum() - found.mean).abs(), slack)
        at_most((tree.ravel(diagonal.mean)[0] - products.mean(0)).abs(), slack)
        if num > 1:
            at_most((found.stderr - products.sum(1).std() / num**0.5).abs(), slack)
            at_most((tree.ravel(diagonal.stderr)[0] - products.std(0) / num**0.5).abs(), slack)

    @rule(seed=SEEDS, rtol=st.sampled_from([None, 0.05]))
    def trace_of_many(self, seed, rtol):
        found = self.call("hutchinson", hf.hutchinson, True, hf.gaussian(self.like, 100, seed=seed), rtol=rtol)
        assert 10 <= found.num_matvecs <= 100
        error = (found.mean - self.matrix.trace()).abs()
        at_most(error, (8 if found.num_matvecs == 100 else 50) * found.stderr + self.slack)
        norms = self.call("squared_frobenius", hf.squared_frobenius, True, hf.gaussian(self.like, 100, seed=seed))
        at_most((norms.mean - self.size**2).abs(), 8 * norms.stderr + self.slack * self.size)

    @rule(num=COUNTS, seed=SEEDS)
    def sketches(self, num, seed):
        probes = hf.gaussian(self.like, max(num, 0), seed=seed)
        valid = 2 <= num <= self.n
        exact = valid and 2 * int(torch.linalg.matrix_rank(self.matrix)) <= num and self.eps < 1e-6
        for name, function in (("hutchpp", hf.hutchpp), ("xtrace", hf.xtrace), ("xdiag", hf.xdiag)):
            found = self.call(name, function, valid, probes)
            if found is None:
                continue
            for leaf in tree.leaves(found.stderr):
                assert num // 2 == 1 or ((leaf >= 0).all() and leaf.isfinite().all())
            mean = tree.ravel(found.mean)[0].double() if name == "xdiag" else found.mean
            assert mean.isfinite().all()
            if exact and name == "hutchpp":
                at_most((mean - self.matrix.trace()).abs(), 100 * self.slack)

    @rule(k=st.integers(1, 3), num=st.integers(1, 6), seed=SEEDS)
    def deflated(self, k, num, seed):
        k = min(k, self.n)
        pairs = hf.eigsh(self.matvec, self.start(seed), k)
        if self.eps > 1e-3:
            return
        found = self.call("deflated_trace", hf.deflated_trace, True, hf.rademacher(self.like, num, seed=seed), pairs)
        assert found.mean.isfinite()
        q = flat(pairs.vectors)
        outside = torch.eye(self.n).double() - q.T @ q
        z = torch.stack([tree.ravel(z)[0].double() for z in hf.rademacher(self.like, num, seed=seed)]) @ outside
        expected = pairs.values.sum() + (z * (z @ self.matrix)).sum(1).mean()
        at_most((found.mean - expected).abs(), 20 * self.slack)

    @rule(
        num=st.integers(0, 3),
        m=COUNTS,
        orthogonalize=st.booleans(),
        sigma=st.none() | st.sampled_from([-1.0, 0.0, 0.1]),
        linthresh=st.none() | st.sampled_from([0.0, 0.1]),
        seed=SEEDS,
    )
    def densities(self, num, m, orthogonalize, sigma, linthresh, seed):
        probes = hf.gaussian(self.like, num, seed=seed)
        valid = num > 0 and 1 <= m <= self.n
        rule = self.call("slq", hf.slq, valid, probes, m, orthogonalize=orthogonalize)
        if rule is None:
            return
        nodes, weights = rule
        at_most((weights.sum(1) - 1).abs(), 1e-12)
        at_most(-weights, 0.0)
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        at_most(nodes, eigenvalues[-1] + self.slack)
        at_most(-nodes, self.slack - eigenvalues[0])
        z = torch.stack([tree.ravel(probe)[0].double() for probe in probes])
        first = (z * (z @ self.matrix)).sum(1) / z.square().sum(1)
        at_most(((weights * nodes).sum(1) - first).abs(), self.slack)
        total = hf.trace_of(rule, torch.abs, self.n)
        at_most(total.mean, self.n * (self.size + self.slack))
        steps = hf.cumulative(rule)
        at_most(-steps.values.diff(), 0.0)
        at_most((steps.values[-1] - 1).abs(), 1e-12)
        at_most(hf.wasserstein(rule, rule).abs(), 0.0)
        at_most(hf.wasserstein(rule, eigenvalues), 2 * self.size + self.slack)
        size = self.size or 1.0  # on a logarithmic axis a width has no unit
        options = {
            "sigma": sigma and (sigma if linthresh else sigma * size),
            "linthresh": linthresh and linthresh * size,
        }
        valid = all(x is None or x > 0 for x in options.values())
        smooth = self.call("density", lambda _, rule, **options: hf.density(rule, **options), valid, rule, **options)
        if smooth is not None and not linthresh:
            at_most(-smooth.values, 0.0)
            at_most((torch.trapezoid(smooth.values, smooth.grid) - 1).abs(), 1e-3)

    @rule(seed=SEEDS)
    def is_a_matrix(self, seed):
        CALLS["check_matvec"] += 1
        if self.eps < 1e-3:
            hf.check_matvec(self.matvec, self.like, seed=seed)
        at_most((hf.dense(self.matvec, self.like).double() - self.matrix).abs(), self.slack)


OPTIONS = {
    "deadline": None,
    "database": None,
    "stateful_step_count": 8,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.slow
def test_every_call_tells_the_truth_or_what_is_wrong():
    run_state_machine_as_test(Fuzz, settings=settings(max_examples=15, derandomize=True, **OPTIONS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        run_state_machine_as_test(Fuzz, settings=settings(max_examples=10, phases=[Phase.generate], **OPTIONS))
    print(f"{CALLS.total()} calls, {REFUSED.total()} of them refused: {dict(CALLS)}")
