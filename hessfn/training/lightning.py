"""Curvature along a training with Lightning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from hessfn.core.errors import MissingExtra
from hessfn.losses.functional import Choice
from hessfn.training.figures import density_figure, log_figure
from hessfn.training.monitor import Monitor
from hessfn.training.present_loss import is_trained, refuse_parts

# They are two packages with the same code: whose trainer runs is the one that the program has imported.
_PACKAGES = ["lightning.pytorch.callbacks", "pytorch_lightning.callbacks"]
_Callback: Any = object
for _package in reversed(_PACKAGES) if "pytorch_lightning" in sys.modules else _PACKAGES:
    with suppress(ModuleNotFoundError):
        _Callback = importlib.import_module(_package).Callback
        break


class CurvatureCallback(_Callback):
    """Logs the curvature of a fixed batch while Lightning trains.

    ``Trainer(callbacks=[CurvatureCallback(batch, criterion)])``.

    At every measurement the trainer's loggers get, each error beside its number:

    ================================ =====================================================================
    ``sharpness``                    the largest eigenvalue of the Hessian
    ``sharpness_residual``           an eigenvalue lies within this distance of it
    ``sharpness_others``             all others are below this, with probability 0.999
    ``preconditioned_sharpness``     the same three of ``P^(-1/2) H P^(-1/2)``, where the optimizer is Adam or AdamW
    ``trace``, ``trace_stderr``      the trace, and its standard error by the probes
    ``loss``                         the loss of the batch, in evaluation mode (BatchNorm as in training)
    ``num_matvecs``, ``seconds``     products and time of the measurement
    ``share_of_time``                the part of the training's time that all measurements have taken
    ================================ =====================================================================

    The training stays the same to the bit: no weight, buffer, gradient, mode or random number changes. A checkpoint
    contains the state of the callback, with which a resumed training continues.

    Args:
        batch: ``(inputs, targets)``, or a mapping that goes to both sides, as for :func:`hessfn.functionalize`. A copy
            is kept. How far the numbers of a batch are from those of all data: see :func:`hessfn.cross_fitted`.
        criterion: ``criterion(module(inputs), targets)``, a mean over the batch.
        every: measure after each multiple of this number of steps of the optimizer.
        max_share: the part of the wall-clock time of the training, including validation, that measurements may take. A
            measurement that would exceed it is skipped, except the first one, which also traces the loss. None for no
            limit.
        params: which parameters, as for :func:`hessfn.functionalize`; by default those that are trained.
        k: how many of the largest eigenvalues; the next ones are ``sharpness_2`` and so on.
        rtol: the relative residual asked of them.
        num_probes: random vectors for the trace; 0 for none.
        density_matvecs: this many more products each time, for a figure of the spectral density, for loggers that take
            figures; 0 for none.
        module: the name of the part of the LightningModule to analyse, such as ``"net"``; by default the ``forward`` of
            the whole.
        prefix: of the names in the logger.

    On several processes rank 0 measures, on its own copy of the model, while the others wait at their next step.

    Cost: about 20 products each time, with Adam about 30 to 50; the first time also a trace of the loss. Memory as for
    :func:`hessfn.linearized_hvp`, and one vector for each eigenvalue.

    Raises:
        ModuleNotFoundError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
        ValueError: an argument is out of range; at the start of the training, the parameters are sharded; at the first
            measurement, what :func:`hessfn.functionalize` and :func:`hessfn.hvp` refuse. A later measurement that
            fails, as of a training that diverges, is a warning.

    Source: for sharpness along a training, Cohen et al. (2021); for the preconditioned one, Cohen et al. (2022).
    """

    def __init__(
        self,
        batch: Any,
        criterion: Callable[[Any, Any], Tensor],
        *,
        every: int = 100,
        max_share: float | None = 0.05,
        params: Choice = is_trained,
        k: int = 1,
        rtol: float = 1e-2,
        num_probes: int = 8,
        density_matvecs: int = 0,
        module: str = "",
        prefix: str = "curvature/",
    ) -> None:
        if _Callback is object:
            raise MissingExtra('this callback is for Lightning: pip install "hessfn[lightning]"')
        super().__init__()
        self._module, self._prefix = module, prefix
        self._monitor = Monitor(
            batch,
            criterion,
            every=every,
            max_share=max_share,
            params=params,
            k=k,
            rtol=rtol,
            num_probes=num_probes,
            density_matvecs=density_matvecs,
            prefix=prefix,
        )

    @property
    def state_key(self) -> str:
        """By which a checkpoint tells several of these callbacks apart."""
        return f"{type(self).__qualname__}({self._prefix!r}, {self._module!r})"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_parts(pl_module)  # on every process: an error of one alone would let the others wait for ever
        self._monitor.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not trainer.is_global_zero or not self._monitor.is_due(step):
            return
        with _without_trainer(pl_module):
            measured = self._monitor.measure(pl_module.get_submodule(self._module), trainer.optimizers, step)
        if measured is None:
            return
        for logger in trainer.loggers:
            logger.log_metrics(measured.scalars, step=step)
            if measured.density is not None:
                log_figure(logger, self._prefix + "density", density_figure(measured.density, step), step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._monitor.stop()

    def state_dict(self) -> dict[str, Any]:
        return self._monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._monitor.load_state_dict(state_dict)


@contextmanager
def _without_trainer(model: nn.Module) -> Iterator[None]:
    """A loss copies the model's structure, and what leads to the trainer leads to everything."""
    kept = [
        (vars(module), name, vars(module)[name])
        for module in model.modules()
        for name in ("_trainer", "_fabric")
        if vars(module).get(name) is not None
    ]
    try:
        for attributes, name, _ in kept:
            attributes[name] = None
        yield
    finally:
        for attributes, name, value in kept:
            attributes[name] = value
