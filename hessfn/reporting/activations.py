"""The activations of a report: traces by layer of what flows through it, and of its weight."""

from __future__ import annotations

import itertools
from operator import length_hint
from typing import Any

from torch import Tensor, nn

from hessfn.core import tree
from hessfn.core.errors import JournalError
from hessfn.core.results import Sensitivities
from hessfn.core.tree import MatVec
from hessfn.core.warn import warn
from hessfn.quantization.sensitivity import has_matrix, sensitivities
from hessfn.reporting.options import Options
from hessfn.reporting.problem import Prepared, converted
from hessfn.reporting.progress import kept_and_counted, progress_bar
from hessfn.reporting.workspace import Keep


def analyse_activations(problem: Prepared, options: Options, keep: Keep) -> Sensitivities | None:
    """Traces by layer, from a journal for each batch; None where none are asked for, or none can be had."""
    num_probes, numbers = options.num_activation_probes, itertools.count()
    layers = [(name, module) for name, module in problem.model.named_modules() if name]
    if not num_probes or not any(has_matrix(name, module) for name, module in layers):
        return None
    model, criterion = _casting(*converted(problem.model, problem.criterion, options), options)
    num_products = num_probes * length_hint(problem.batches)
    with progress_bar(options, num_products, "product", "activations") as bar:

        def counted(matvec: MatVec) -> MatVec:
            return kept_and_counted(matvec, keep, f"activations-{next(numbers)}", bar)

        try:
            return sensitivities(
                model,
                criterion,
                problem.batches,
                num_probes=num_probes,
                seed=options.seed,
                weights=problem.weights,
                transform=counted,
            )
        except (ValueError, RuntimeError) as error:
            if JournalError in (type(error), type(error.__cause__)):  # the cause where a batch is named
                raise
            warn(f"the report leaves the activations out: {error}")
            return None


def _casting(model: nn.Module, criterion: Any, options: Options) -> tuple[nn.Module, Any]:
    """A model and a criterion that take batches of any dtype, where one was asked for; the model is our own copy."""
    dtype = options.torch_dtype
    if dtype is None:
        return model, criterion

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    model.register_forward_pre_hook(lambda _, args, kwargs: tree.map(cast, (args, kwargs)), with_kwargs=True)
    return model, lambda outputs, targets: criterion(outputs, tree.map(cast, targets))
