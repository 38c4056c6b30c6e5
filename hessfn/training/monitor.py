"""What the callbacks of all trainers share: when to measure, what, and what is kept for the next time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from hessfn.core import tree
from hessfn.core.errors import HessfnError, InvalidInput
from hessfn.core.fingerprints import fingerprint
from hessfn.core.probes import gaussian, rademacher
from hessfn.core.results import Density, EigenPairs, FollowState
from hessfn.core.tree import MatVec
from hessfn.core.warn import warn
from hessfn.estimators.hutchinson import hutchinson
from hessfn.estimators.spectrum import density, slq
from hessfn.losses.functional import Choice, Params
from hessfn.training.adam import adam_scale
from hessfn.training.budget import Budget
from hessfn.training.follow import follow
from hessfn.training.present_loss import Criterion, PresentLoss, is_trained
from hessfn.transforms.scaling import scaled


class Measured(NamedTuple):
    """What one measurement has found."""

    scalars: dict[str, float]  # by name, of a logger
    density: Density | None


class Monitor:
    """Curvature of a model in training, on one batch.

    A measurement changes nothing of the training: no parameter, buffer, gradient, mode or random state.
    """

    def __init__(
        self,
        batch: Any,
        criterion: Criterion,
        *,
        every: int = 100,
        max_share: float | None = 0.05,
        params: Choice = is_trained,
        k: int = 1,
        rtol: float = 1e-2,
        num_probes: int = 8,
        density_matvecs: int = 0,
        prefix: str = "curvature/",
    ) -> None:
        for name, value, least in (("every", every, 1), ("k", k, 1), ("density_matvecs", density_matvecs, 0)):
            if value < least:
                raise InvalidInput(f"{name}={value} must be at least {least}")
        if num_probes < 0 or num_probes == 1:
            raise InvalidInput(f"num_probes={num_probes} must be 0, for no trace, or at least 2, for one with an error")
        self._loss = PresentLoss(batch, criterion, params)
        self.budget = Budget(max_share)
        self._every, self._k, self._rtol, self._prefix = every, k, rtol, prefix
        self._num_probes, self._density_matvecs = num_probes, density_matvecs
        self._states: dict[str, FollowState[Params] | None] = {"sharpness": None, "preconditioned": None}
        self._last_step = 0
        self._has_measured = False

    def start(self) -> None:
        self.budget.start()

    def stop(self) -> None:
        self.budget.stop()

    def is_due(self, step: int) -> bool:
        """Whether to measure after so many steps of the optimizer: at a multiple of ``every``, once, in the budget."""
        return step > 0 and step != self._last_step and step % self._every == 0 and self.budget.allows()

    def measure(self, model: nn.Module, optimizers: Any, step: int) -> Measured | None:
        """The scalars, each error beside its number; None, with a warning, where nothing could be measured.

        The first time an error is raised: it is the caller's. Later the model is what has changed, as when a training
        diverges, and that must not end it.
        """
        self._last_step = step
        _wait_for(model)
        try:
            with self.budget.measuring():
                scalars, found = self._measured(model, optimizers)
        except HessfnError as error:
            if not self._has_measured:
                raise
            warn(f"no curvature at step {step}: {error}")
            return None
        self._has_measured = True
        scalars |= {"seconds": self.budget.latest, "share_of_time": self.budget.spent_share()}
        return Measured({self._prefix + name: value for name, value in scalars.items()}, found)

    def _measured(self, model: nn.Module, optimizers: Any) -> tuple[dict[str, float], Density | None]:
        value, params, matvec, live = self._loss.at(model)
        pairs = self._follow("sharpness", matvec, params)
        scalars = {"loss": float(value), **_of_pairs("sharpness", pairs)}
        num_matvecs = int(pairs.num_matvecs)
        scale = _scale(optimizers, live)
        if scale is not None:
            preconditioned = self._follow("preconditioned", scaled(matvec, scale), params)
            scalars |= _of_pairs("preconditioned_sharpness", preconditioned)
            num_matvecs += int(preconditioned.num_matvecs)
        if self._num_probes:
            trace = hutchinson(matvec, rademacher(params, self._num_probes), eigenpairs=pairs)
            scalars |= {"trace": float(trace.mean), "trace_stderr": float(trace.stderr)}
            num_matvecs += int(trace.num_matvecs)
        found = None
        if self._density_matvecs:
            steps = min(self._density_matvecs, tree.numel(params))
            found = density(slq(matvec, gaussian(params, 1), steps, eigenpairs=pairs))
            num_matvecs += steps
        return {**scalars, "num_matvecs": float(num_matvecs)}, found

    def _follow(self, name: str, matvec: MatVec[Params], params: Params) -> EigenPairs[Params]:
        state = self._states[name]
        if state is not None and not _fits(state, params, self._k):
            state = None  # the model is another one: some of its layers have been frozen, say
        pairs, self._states[name] = follow(matvec, state, like=params, k=self._k, rtol=self._rtol)
        return pairs

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings, which ``torch.load`` reads without this library."""
        followed = {name: state._asdict() for name, state in self._states.items() if state is not None}
        return {"followed": followed, "time": self.budget.state_dict(), "batch": fingerprint(self._loss.batch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["batch"] != fingerprint(self._loss.batch):
            warn("the curvature is that of another batch than before the training was interrupted")
        for name, fields in state["followed"].items():
            self._states[name] = FollowState(**fields)
        self.budget.load_state_dict(state["time"])


def _of_pairs(name: str, pairs: EigenPairs[Params]) -> dict[str, float]:
    """The largest eigenvalue, how far it may be off, below what all others are; and the next ones."""
    found = {name: float(pairs.values[0]), f"{name}_residual": float(pairs.residuals[0])}
    for i, (value, residual) in enumerate(zip(pairs.values[1:], pairs.residuals[1:], strict=True), 2):
        found |= {f"{name}_{i}": float(value), f"{name}_{i}_residual": float(residual)}
    if pairs.outside is not None:
        found[f"{name}_others"] = float(pairs.outside[1])
    return found


def _scale(optimizers: Any, live: Params) -> Params | None:
    """Adam's, where an optimizer is Adam and has a state of every parameter; else nothing is said of it."""
    for optimizer in optimizers:
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        if isinstance(inner, (Adam, AdamW)):
            try:
                return adam_scale(inner, live)
            except InvalidInput:
                continue
    return None


def _fits(state: FollowState[Params], params: Params, k: int) -> bool:
    vectors = state.vectors
    return vectors.keys() == params.keys() and all(vectors[name].shape == (k, *p.shape) for name, p in params.items())


def _wait_for(model: nn.Module) -> None:
    """What the device still has to do for the training is not the measurement's time."""
    first: Tensor | None = next(model.parameters(), None)
    if first is not None and first.device.type != "cpu" and first.numel():
        math.isnan(float(first.detach().reshape(-1)[0]))
