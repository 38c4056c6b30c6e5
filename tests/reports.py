"""What ``hessfn report`` writes, of a net so small that its Hessians are dense: no number in it is hessfn's own."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from nets import classes, normal
from torch import Tensor
from torch.autograd.functional import hessian

WIDTHS = (5, 6, 3)
SHAPES = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
NUMEL = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
N = sum(NUMEL.values())
K = 3


class Truth(NamedTuple):
    """The dense Hessians of a net by batches, and what they say."""

    parts: np.ndarray  #: (b, n, n)
    losses: np.ndarray  #: (b,)

    @property
    def whole(self) -> np.ndarray:
        return self.parts.mean(0)

    @property
    def trace(self) -> float:
        return float(np.trace(self.whole))

    @property
    def layers(self) -> dict[str, float]:
        return {name: float(np.trace(self.whole[at, at])) for name, at in blocks().items()}

    @property
    def sharpness(self) -> float:
        return float(np.linalg.eigvalsh(self.whole)[-1])


def blocks() -> dict[str, slice]:
    """Where each layer lies in a flat vector."""
    ends = np.cumsum([0, *NUMEL.values()]).tolist()
    return {name: slice(*ends[i : i + 2]) for i, name in enumerate(NUMEL)}


def data(num_batches: int = 4, size: int = 15, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    made = []
    for i in range(num_batches):
        targets = classes(size, WIDTHS[-1], seed=50 + i + 1000 * seed)
        centres = 1.5 * normal(WIDTHS[-1], WIDTHS[0], seed=7)
        made.append((centres[targets] + normal(size, WIDTHS[0], seed=150 + i + 1000 * seed), targets))
    return made


def loss(theta: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    at = {name: theta[where].reshape(SHAPES[name]) for name, where in blocks().items()}
    hidden = torch.tanh(batch[0] @ at["0.weight"].T + at["0.bias"])
    return torch.nn.functional.cross_entropy(hidden @ at["2.weight"].T + at["2.bias"], batch[1])


def trained(num_steps: int = 60, seed: int = 3) -> Tensor:
    """Gradient descent from a random start."""
    theta = 0.5 * normal(N, seed=seed)
    for _ in range(num_steps):
        theta = theta.detach().requires_grad_()
        total = torch.stack([loss(theta, batch) for batch in data()]).mean()
        theta = theta - 0.5 * torch.autograd.grad(total, theta)[0]
    return theta.detach()


def truth(theta: Tensor, batches: list[tuple[Tensor, Tensor]] | None = None) -> Truth:
    batches = data() if batches is None else batches
    parts = torch.stack([hessian(lambda x, b=batch: loss(x, b), theta, vectorize=True) for batch in batches])
    return Truth(parts.numpy(), np.array([float(loss(theta, batch)) for batch in batches]))


def report_of(
    net: Truth, *, num_probes: int = 24, num_pairs: int = K, probe_seed: int = 0, fingerprint: str = "digits"
) -> dict[str, Any]:
    """A ``report.json`` of schema 2, as a dict: what an analysis with these probes finds."""
    parts, whole, b = net.parts, net.whole, len(net.parts)
    values, vectors = np.linalg.eigh(whole)
    top = np.argsort(-np.abs(values))[:K]
    forms = np.einsum("ik,bij,jk->kb", vectors[:, top], parts, vectors[:, top])
    z = np.random.default_rng(probe_seed).choice([-1.0, 1.0], (num_probes, N))
    # With the pairs as a control variate, as facts of the report have it.
    part_samples = {name: z[:, at] * (z @ whole)[:, at] for name, at in blocks().items()}
    plain = {name: x.sum(1) for name, x in part_samples.items()}
    pairs, layers = np.argsort(-np.abs(values))[:num_pairs], {}
    overlaps = z @ vectors[:, pairs]
    for name, at in blocks().items():
        q = vectors[at, :][:, pairs]
        expected = (z[:, at] @ q) * overlaps - (q**2).sum(0)
        layers[name] = plain[name] - expected @ values[pairs]
    total = sum(layers.values())
    by_entry = (z * (z @ parts)).mean(1)  # (b, n)
    by_batch = by_entry.sum(1)
    layers_by_batch = {name: by_entry[:, at].sum(1) for name, at in blocks().items()}
    grid = np.linspace(values[0] - 1, values[-1] + 1, 201)
    smeared = np.exp(-0.5 * ((grid[:, None] - values) / 0.1) ** 2).mean(1) / (0.1 * np.sqrt(2 * np.pi))
    bottom, squares = float(values[0]), values**2
    bottom_forms = np.einsum("i,bij,j->b", vectors[:, 0], parts, vectors[:, 0])
    return {
        "schema": 2,
        "date": "2026-11-26T04:00:00Z",
        "loss": float(net.losses.mean()),
        "loss_data_stderr": spread(net.losses),
        "accuracy": {"value": 0.9, "stderr": 0.039},
        "gradient_norm": 0.0123,
        "eigenvalues": values[top].tolist(),
        "residuals": [1e-6] * K,
        "rounding": [1e-9] * K,
        "data_stderr": [spread(row) for row in forms],
        "converged": [True] * K,
        "sharpness": {
            "value": float(values[-1]),
            "residual": 1e-6,
            "rounding": 1e-9,
            "data_stderr": spread(forms[0]),
            "lower": float(values[-1]) - 2.5 * spread(forms[0]),
            "upper": float(values[-1]) + 1.5 * spread(forms[0]),
        },
        "trace": {**mean_and_error(total), **errors(by_batch), **ends(total)},
        "negative_curvature": {
            "smallest": {"value": bottom, "residual": 1e-5, "converged": True, **errors(bottom_forms)},
            "share_of_squares": {
                "mean": float(squares[values < 0].sum() / squares.sum()),
                "stderr": 0.002,
                "steps_error": 0.001,
            },
        },
        "density": {
            "grid": grid.tolist(),
            "values": smeared.tolist(),
            "lower": (0.7 * smeared - 1e-3).clip(0).tolist(),
            "upper": (1.3 * smeared + 1e-3).tolist(),
        },
        "layers": {
            name: {
                "numel": NUMEL[name],
                "trace": float(x.mean()),
                "stderr": mean_and_error(x)["stderr"],
                **errors(layers_by_batch[name]),
                "top": float(np.linalg.eigvalsh(whole[blocks()[name], blocks()[name]])[-1]),
                "top_residual": 1e-4,
                "stable_rank": 2.5,
                "stable_rank_stderr": 0.1,
                "pairs_share": 0.8,
            }
            for name, x in layers.items()
        },
        "activations": {
            name: {"numel": width, "trace": 3.0 + i, "stderr": 0.2, "weight_numel": NUMEL[f"{name}.weight"]}
            | {"weight_trace": 2.0, "weight_stderr": 0.1}
            for i, (name, width) in enumerate({"0": 5, "2": 6}.items())
        },
        "landscape": landscape(float(net.losses.mean())),
        "model": {"name": "Sequential", "layers": 2, "parameters": N, "mode": "eval", "criterion": "CrossEntropyLoss"},
        "data": {"num_batches": b, "batch_sizes": [15] * b, "num_samples": 15 * b, "parts": 4},
        "cost": {"products": 87, "seconds": 12.3, "stages": {"eigenvalues": 4.0, "trace": 6.0, "landscape": 2.3}}
        | {"threads": 2, "kernel": True, "products_mode": "linearized", "peak_vectors": 31.0},
        "samples": {
            "probe_seed": probe_seed,
            "trace": total.tolist(),
            "layers": {name: x.tolist() for name, x in layers.items()},
            "plain": {
                "trace": sum(plain.values()).tolist(),
                "layers": {name: x.tolist() for name, x in plain.items()},
            },
            "batch_weights": [15.0] * b,
            "batches": {
                "losses": net.losses.tolist(),
                "trace": by_batch.tolist(),
                "eigenvalues": forms.tolist(),
                "layers": {name: x.tolist() for name, x in layers_by_batch.items()},
            },
            "data": fingerprint,
        },
        "settings": {"problem": "nets:small", "num_parameters": N, "num_samples": 15 * b, "k": K, "which": "LM"}
        | {"rtol": 1e-3, "num_probes": num_probes, "num_runs": 4, "num_steps": 30, "num_activation_probes": 30}
        | {"seed": probe_seed, "dtype": "float64", "device": "cpu", "radius": 1.0, "params": "*", "command": ""},
        "versions": {"hessfn": "0.1.0", "torch": "2.14.1"},
    }


def landscape(middle: float) -> dict[str, Any]:
    steps, at = np.linspace(-1, 1, 9), np.linspace(-1, 1, 5)
    plane = middle + at[:, None] ** 2 + 0.3 * at**2
    curves = {"top eigenvector": 4.0, "random": 0.1, "gradient": 1.0}
    return {
        "steps": steps.tolist(),
        "losses": {name: (middle + bend * steps**2).tolist() for name, bend in curves.items()},
        "plane": {
            "steps": at.tolist(),
            "losses": plane.tolist(),
            "measured": [[(i + j) % 2 == 0 for j in range(5)] for i in range(5)],
            "directions": ["eigenvector of 4", "eigenvector of 1"],
        },
    }


def spread(batches: np.ndarray) -> float:
    """The standard error of a mean over batches of equal size."""
    return float(batches.std(ddof=1) / np.sqrt(len(batches)))


def errors(batches: np.ndarray) -> dict[str, float]:
    return {"rounding": 1e-9, "data_stderr": spread(batches)}


def mean_and_error(samples: np.ndarray) -> dict[str, float]:
    return {"mean": float(samples.mean()), "stderr": spread(samples)}


def ends(samples: np.ndarray) -> dict[str, float]:
    middle, reach = float(samples.mean()), 2.07 * spread(samples)
    return {"lower": middle - reach, "upper": middle + reach}


def changed(result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy in which ``a__b=x`` has changed the entry ``b`` of ``a``."""
    result = copy.deepcopy(result)
    for path, value in changes.items():
        *outer, last = path.split("__")
        inner = result
        for name in outer:
            inner = inner[name]
        inner[last] = value
    return result


def written(where: Path, result: dict[str, Any]) -> Path:
    where.mkdir(parents=True)
    (where / "report.json").write_text(json.dumps(result), "utf-8")
    return where
