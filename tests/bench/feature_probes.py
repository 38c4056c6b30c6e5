"""The same questions to each library, for bench_features.py: each function asserts that the answer is right."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hessfn as hf


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double().eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(2, 3)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


CRITERION = nn.CrossEntropyLoss()
Y = torch.arange(40) % 3
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "plain": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), normal(40, 5)),
    "norm": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)), normal(40, 5)),
    "attention": (Attention, normal(40, 6, 8)),
}


class Case:
    """A net with its data in batches of 25 and 15 samples, and its exact Hessian by torch alone."""

    def __init__(self, name: str = "plain", sizes: tuple[int, ...] = (25, 15)) -> None:
        build, x = NETS[name]
        self.model = seeded(build)
        self.params = list(self.model.parameters())
        self.whole = x, Y
        self.loader = list(zip(x.split(sizes), Y.split(sizes), strict=True)) if len(sizes) > 1 else [self.whole]
        self.n = sum(p.numel() for p in self.params)

    def exact(self) -> Tensor:
        flat, unravel = hf.tree.ravel({name: p.detach() for name, p in self.model.named_parameters()})

        def loss(w: Tensor) -> Tensor:
            with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
                return CRITERION(torch.func.functional_call(self.model, unravel(w), self.whole[0]), self.whole[1])

        return torch.autograd.functional.hessian(loss, flat)


def columns(multiply: Callable[[Tensor], Tensor], n: int) -> Tensor:
    return torch.stack([multiply(unit) for unit in torch.eye(n).double()], 1)


def right(found: Tensor, exact: Tensor, within: float = 1e-6) -> None:
    off = float((found - exact).norm() / exact.norm())
    assert off < within, f"off by {off:.1g}"


def ours(case: Case) -> tuple[Any, hf.MatVec]:
    loss, params = hf.functionalize(case.model, CRITERION)
    return params, hf.mean_hvp(loss, params, case.loader)


def pyhessian(case: Case) -> Any:
    return importlib.import_module("pyhessian").hessian(case.model, CRITERION, dataloader=case.loader, cuda=False)


def curvlinops(case: Case, kind: str = "Hessian", **options: Any) -> Any:
    make = getattr(importlib.import_module("curvlinops"), f"{kind}LinearOperator")
    return make(case.model, CRITERION, case.params, case.loader, check_deterministic=False, **options)


def eigenthings(case: Case) -> Any:
    peer = importlib.import_module("hessian_eigenthings")
    return peer.HessianOperator(case.model, case.loader, peer.supervised_loss(CRITERION))


def matrix(library: str, *given: Any) -> None:
    case = Case(*given)
    exact = case.exact()
    if library == "hessfn":
        params, matvec = ours(case)
        right(hf.dense(matvec, params), exact)
    elif library == "PyHessian":
        product, unravel = pyhessian(case).dataloader_hv_product, hf.tree.ravel(case.params)[1]
        right(columns(lambda v: hf.tree.ravel(product(unravel(v))[1])[0], case.n), exact)
    elif library == "curvlinops":
        right(curvlinops(case) @ torch.eye(case.n).double(), exact)
    else:
        right(columns(eigenthings(case).matvec, case.n), exact)


def gauss_newton(library: str) -> None:
    """And the empirical Fisher matrix, the mean of gradients' squares."""
    case = Case(sizes=(40,))
    forward, params = hf.stateless(case.model)
    flat, unravel = hf.tree.ravel(params)
    outputs = torch.func.jacrev(lambda w: forward(unravel(w), case.whole[0]))(flat)
    p = forward(params, case.whole[0]).softmax(1)
    exact = torch.einsum("bci,bcd,bdj->ij", outputs, p.diag_embed() - p[:, :, None] * p[:, None], outputs) / len(Y)
    gradients = torch.einsum("bci,bc->bi", outputs, p - nn.functional.one_hot(Y, 3))
    fisher = gradients.T @ gradients / len(Y)
    if library == "hessfn":
        right(hf.dense(hf.ggnvp(forward, CRITERION, params, case.whole), params), exact)
        right(hf.dense(hf.fvp(forward, CRITERION, params, case.whole), params), fisher)
    elif library == "curvlinops":
        right(curvlinops(case, "GGN") @ torch.eye(case.n).double(), exact)
        right(curvlinops(case, "EF") @ torch.eye(case.n).double(), fisher)
    else:
        peer, given = importlib.import_module("hessian_eigenthings"), (case.model, case.loader)
        operator = peer.GGNOperator(*given, peer.supervised_forward, peer.supervised_loss_of_output(CRITERION))
        right(columns(operator.matvec, case.n), exact)
        operator = peer.EmpiricalFisherOperator(*given, peer.supervised_per_sample_loss(CRITERION))
        right(columns(operator.matvec, case.n), fisher)


def kronecker(library: str) -> None:
    """That they can be had; of the Jacobian also that it is right."""
    case, peer = Case(sizes=(40,)), importlib.import_module("curvlinops")
    for kind in ("KFAC", "EKFAC"):
        inverse = peer.KFACInverseLinearOperator(curvlinops(case, kind), damping=1e-2, use_exact_damping=True)
        assert torch.isfinite(inverse @ torch.ones(case.n).double()).all()
    jacobian = peer.JacobianLinearOperator(case.model, case.params, case.loader, check_deterministic=False)
    forward, params = hf.stateless(case.model)
    flat, unravel = hf.tree.ravel(params)
    exact = torch.func.jacrev(lambda w: forward(unravel(w), case.whole[0]))(flat).flatten(0, 1)
    right(jacobian @ torch.eye(case.n).double(), exact)


def eigenpairs(library: str) -> None:
    """With the residual of each pair, or its like, in the result."""
    case = Case(sizes=(40,))
    exact = torch.linalg.eigvalsh(case.exact()).flip(0)[:3]
    if library == "hessfn":
        params, matvec = ours(case)
        found = hf.eigsh(matvec, hf.gaussian(params, 1)[0], 3, which="LA")
        values, residuals = found.values, found.residuals
    else:
        peer = importlib.import_module("hessian_eigenthings")
        result = peer.lanczos(eigenthings(case), k=3, max_iter=40, which="LA", seed=0)
        values, residuals = result.eigenvalues.sort(descending=True).values, result.residuals
    assert (residuals >= 0).all()
    right(values, exact, 1e-3)


def trace(library: str) -> None:
    """With its standard error in the result."""
    case = Case(sizes=(40,))
    exact = float(case.exact().trace())
    if library == "hessfn":
        params, matvec = ours(case)
        estimate = hf.hutchinson(matvec, hf.rademacher(params, 60))
        mean, stderr = float(estimate.mean), float(estimate.stderr)
    else:
        result = importlib.import_module("hessian_eigenthings").trace(eigenthings(case), num_matvecs=60, seed=0)
        mean, stderr = result.estimate, result.stderr
    assert stderr > 0 and abs(mean - exact) < 5 * stderr


def density(library: str) -> None:
    case = Case(sizes=(40,))
    largest = torch.linalg.eigvalsh(case.exact()).max()
    if library == "hessfn":
        params, matvec = ours(case)
        grid = hf.density(hf.slq(matvec, hf.gaussian(params, 2), 30)).grid
    elif library == "PyHessian":
        grid = torch.tensor(pyhessian(case).density(iter=30)[0][0])
    elif library == "curvlinops":
        grid, heights = importlib.import_module("curvlinops").lanczos_approximate_spectrum(curvlinops(case), 30)
        assert (heights >= 0).all()
    else:
        result = importlib.import_module("hessian_eigenthings").spectral_density(eigenthings(case), lanczos_steps=30)
        grid = result.raw_eigenvalues
    assert 0.9 * largest < grid.max() < 2 * largest


def solution(library: str) -> None:
    case = Case(sizes=(40,))
    b = normal(case.n)
    exact = torch.linalg.solve(case.exact() + 2 * torch.eye(case.n).double(), b)
    if library == "hessfn":
        params, matvec = ours(case)
        right(hf.tree.ravel(hf.solve(matvec, hf.tree.ravel(params)[1](b), damping=2.0).x)[0], exact, 1e-4)
    else:
        peer = importlib.import_module("curvlinops")
        eye = importlib.import_module("curvlinops.examples").IdentityLinearOperator
        shapes = [tuple(p.shape) for p in case.params]
        damped = curvlinops(case) + 2 * eye(shapes, torch.device("cpu"), torch.float64)
        right(peer.CGInverseLinearOperator(damped, eps=1e-8, max_iter=500) @ b, exact, 1e-3)


def activations(library: str) -> None:
    """The Hessian by what enters the last layer."""
    case = Case(sizes=(40,))
    entering = case.model[:2](case.whole[0]).detach()
    exact = torch.autograd.functional.hessian(lambda h: CRITERION(case.model[2](h), Y), entering).reshape(320, 320)
    if library == "hessfn":
        loss, shifts = hf.activation_loss(case.model, CRITERION, case.whole, ["2"])
        right(hf.dense(hf.hvp(loss, shifts), shifts), exact)
    else:
        make = importlib.import_module("curvlinops.experimental.activation_hessian").ActivationHessianLinearOperator
        operator = make(case.model, CRITERION, ("2", "input", 0), case.loader, check_deterministic=False)
        right(operator @ torch.eye(320).double(), exact)


def composes(library: str) -> None:
    """A top eigenvalue under vmap over batches, and the gradient of a trace by the parameters."""
    case = Case(sizes=(20, 20))
    loss, params = hf.functionalize(case.model, CRITERION)
    start, probes = hf.gaussian(params, 1)[0], hf.rademacher(params, 2)

    def top(*batch: Tensor) -> Tensor:
        return hf.eigsh(hf.hvp(loss, params, batch), start, which="LA", rtol=None, max_matvecs=10).values[0]

    def trace_at(p: Any) -> Tensor:
        return hf.hutchinson(hf.hvp(loss, p, case.whole), probes).mean

    together = torch.func.vmap(top)(*(torch.stack(x) for x in zip(*case.loader, strict=True)))
    right(together, torch.stack([top(*batch) for batch in case.loader]))
    ends = [trace_at(hf.tree.add(params, start, h)) for h in (1e-4, -1e-4)]
    right(hf.tree.dot(torch.func.grad(trace_at)(params), start), (ends[0] - ends[1]) / 2e-4, 1e-5)


def leaves_no_trace(library: str) -> None:
    """A trace leaves mode and gradients of the model, and the global random state, as they were."""
    case = Case()
    case.model.train()
    before = torch.random.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        if library == "hessfn":
            params, matvec = ours(case)
            hf.hutchinson(matvec, hf.rademacher(params, 3))
        elif library == "PyHessian":
            pyhessian(case).trace(maxIter=3)
        elif library == "curvlinops":
            importlib.import_module("curvlinops").hutchinson_trace(curvlinops(case), num_matvecs=3)
        else:
            importlib.import_module("hessian_eigenthings").trace(eigenthings(case), num_matvecs=3)
        assert torch.equal(torch.random.get_rng_state(), before), "draws from the global generator"
    assert all(module.training for module in case.model.modules()), "the model is in another mode"
    assert all(p.grad is None for p in case.params), "the model has gradients"


def many_processes(library: str) -> None:
    """That there is something for it; the tests of each library have the rest."""
    peer = importlib.import_module(library.replace("-", "_"))
    assert callable(peer.all_reduce if library == "hessfn" else peer.DDPHessianOperator)


def report(library: str) -> None:
    """One page; and a second run of its products finds those of a first one on disk."""
    case = Case()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        hf.report((case.model, CRITERION, case.loader), folder, k=2, num_probes=5, num_runs=1, num_plane_points=0)
        assert Path(folder, "report.html").is_file()
    params, matvec = ours(case)
    with tempfile.TemporaryDirectory() as folder:
        first = hf.hutchinson(hf.journal(matvec, folder, key={}), hf.rademacher(params, 3)).mean
        kept = hf.journal(lambda v: 1 / 0, folder, key={})  # every product is there
        assert torch.equal(hf.hutchinson(kept, hf.rademacher(params, 3)).mean, first)
