"""Curvature along a training with the Trainer of transformers."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessfn.core.errors import MissingExtra
from hessfn.losses.functional import Choice
from hessfn.training.figures import density_figure, log_figure
from hessfn.training.monitor import Monitor
from hessfn.training.present_loss import is_trained, refuse_parts

_Callback: Any = object
with suppress(ModuleNotFoundError):
    _Callback = importlib.import_module("transformers").TrainerCallback


def own_loss(outputs: Any, batch: Any) -> Tensor:
    """What a model computes where its batch has labels."""
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
    return loss


class CurvatureCallback(_Callback):
    """Logs the curvature of a fixed batch while transformers' Trainer trains.

    ``trainer.add_callback(CurvatureCallback(trainer, batch))``. What is logged, how often, and that the training stays
    the same to the bit, is as of :class:`hessfn.training.lightning.CurvatureCallback`; ``trainer.log`` takes it to
    wherever the trainer reports.

    The folder of a checkpoint gets a file with the state of the callback, ``curvature.pt``, with which a resumed
    training continues.

    Args:
        trainer: the one that gets the callback.
        batch: what the model is called with, a mapping with labels, as the trainer's collator makes. A copy is kept.
        criterion: ``criterion(outputs, batch)``, a mean over the batch; by default the loss that the model computes.
        every, max_share, params, k, rtol, num_probes, density_matvecs, prefix: as for Lightning's.

    Cost: as of Lightning's.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
        ValueError: as of Lightning's.

    Source: as of Lightning's.
    """

    def __init__(
        self,
        trainer: Any,
        batch: Any,
        criterion: Callable[[Any, Any], Tensor] = own_loss,
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
        if _Callback is object:
            raise MissingExtra('this callback is for transformers: pip install "hessfn[transformers]"')
        super().__init__()
        self._trainer = weakref.ref(trainer)  # which holds the callback
        self._prefix = prefix
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_parts(kwargs["model"])  # on every process: an error of one alone would let the others wait for ever
        for folder in _resumed_from(args, state):
            if (folder / _FILE).is_file():
                self._monitor.load_state_dict(torch.load(folder / _FILE, map_location="cpu", weights_only=True))
                break
        self._monitor.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is None or not state.is_world_process_zero or not self._monitor.is_due(state.global_step):
            return
        measured = self._monitor.measure(kwargs["model"], [kwargs["optimizer"]], state.global_step)
        if measured is None:
            return
        wanted = control.should_log  # which a log takes back, and with it the trainer's own of this step
        trainer.log(dict(measured.scalars))
        control.should_log = wanted
        if measured.density is not None:
            figure = density_figure(measured.density, state.global_step)
            for callback in trainer.callback_handler.callbacks:
                log_figure(callback, self._prefix + "density", figure, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._monitor.stop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self._monitor.state_dict(), folder / _FILE)


_FILE = "curvature.pt"


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _resumed_from(args: Any, state: Any) -> list[Path]:
    """Where the checkpoint may be that a training goes on from; none of one that begins."""
    if state.global_step == 0:
        return []
    given = args.resume_from_checkpoint
    return [*([Path(given)] if isinstance(given, str) else []), _checkpoint(args, state)]
