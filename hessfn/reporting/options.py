"""The options of a report: the type, default, range and meaning of each, for Python, the command line and the page."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from hessfn.core.errors import InvalidInput

if TYPE_CHECKING:  # `hessfn report --help` lists the options, and need not wait for torch
    import torch

    from hessfn.losses.batches import Weights
    from hessfn.losses.functional import Choice
    from hessfn.parallel.all_reduce import Group

Which = Literal["LM", "LA", "SA", "BE"]
ENDS: Sequence[Which] = ("LM", "LA", "SA", "BE")

# The groups in which `hessfn report --help` lists the options. Numbers depend on those of the first two.
DATA, WORK, OUTPUT = "what to look at", "how much to compute", "output"


def _about(help: str, group: str = "", **argument: Any) -> dict[str, Any]:
    """The meaning of an option, its group, and what else argparse needs to know."""
    return {"help": help, "group": group, "argument": argument}


def _count(help: str, least: int, group: str = WORK, *, or_zero: bool = False) -> dict[str, Any]:
    """An option that is an integer of at least ``least``, or also 0."""
    return _about(help, group, type=int, metavar="N") | {"least": least, "or_zero": or_zero}


def _number(help: str) -> dict[str, Any]:
    """An option that is a positive number."""
    return _about(help, WORK, type=float, metavar="X") | {"positive": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report computes, and how. All options are checked when they are made.

    >>> Options(num_probes=50).num_probes
    50
    >>> Options(num_probes=1)
    Traceback (most recent call last):
    hessfn.core.errors.InvalidInput: num_probes=1 must be at least 2
    """

    name: str = field(default="", metadata=_about("what the page calls the problem"))

    params: Choice = field(
        default="*",
        metadata=_about(
            "the parameters whose names match, the others being constants; may be repeated (default: all)",
            DATA,
            action="append",
            metavar="PATTERN",
        ),
    )
    weights: Weights = field(
        default=None,
        metadata=_about(
            "what each batch counts in the mean, as a function of it (default: what its criterion divides by)"
        ),
    )
    num_batches: int | None = field(default=None, metadata=_count("the first N batches (default: all)", 1, DATA))
    dtype: torch.dtype | str | None = field(
        default=None, metadata=_about("float64, float32, ... (default: the model's)", DATA, metavar="TYPE")
    )
    device: torch.device | str | None = field(
        default=None, metadata=_about("cpu, cuda, cuda:1, ... (default: the model's)", DATA, metavar="DEVICE")
    )

    k: int = field(default=5, metadata=_count("eigenvalues", 1))
    which: Which = field(
        default="LM",
        metadata=_about("those of largest magnitude, the largest, the smallest, or of both ends", WORK, choices=ENDS),
    )
    rtol: float = field(default=1e-3, metadata=_number("residual of an eigenvalue at which it is good, relative to it"))
    num_pairs: int = field(
        default=10, metadata=_count("eigenpairs by which the errors of trace, layers and density are cut", 1)
    )
    num_probes: int = field(default=40, metadata=_count("random vectors for the trace, one product each", 2))
    rtol_trace: float | None = field(
        default=None,
        metadata=_number("take as many probes as it takes for an interval of 95 %% so wide to each side of the trace"),
    )
    num_runs: int = field(default=2, metadata=_count("Lanczos runs for the spectral density", 1))
    num_steps: int = field(default=10, metadata=_count("products in each of these runs", 1))
    num_layers: int = field(
        default=3, metadata=_count("layers whose top eigenvalue is computed; 0 for none", 1, or_zero=True)
    )
    minutes: float | None = field(
        default=None,
        metadata=_number("how long it may take: finds the batches, probes and steps of the smallest errors by itself"),
    )
    num_activation_probes: int = field(
        default=6,
        metadata=_count(
            "random vectors for the traces of activations, a product with each batch; 0 for none", 2, or_zero=True
        ),
    )
    radius: float | None = field(
        default=None,
        metadata=_number(
            "how far the landscape goes each way (default: to about ten times the loss along the top eigenvector)"
        ),
    )
    num_plane_points: int = field(
        default=31,
        metadata=_count(
            "points each way of the plane over the top two eigenvectors, most of them interpolated; 0 for no plane",
            3,
            or_zero=True,
        ),
    )
    seed: int = field(default=0, metadata=_count("of all random vectors", 0))

    resume: bool = field(
        default=False,
        metadata=_about(
            "go on with a report that was killed; other options may be others now, but not the parameters and the data",
            OUTPUT,
        ),
    )
    journal: bool = field(
        default=True,
        metadata=_about(
            "keep no products in DIR/.unfinished meanwhile, each as many bytes as the parameters: nothing to resume",
            OUTPUT,
        ),
    )
    command: str = field(default="", metadata=_about("the command line that does this, for the page to say"))
    group: Group = field(default=None, metadata=_about("processes of torch.distributed that share the work"))

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _checked(option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)  # a frozen dataclass is written to in this way alone
        if self.which not in ENDS:
            raise InvalidInput(f"which={self.which!r} must be one of {', '.join(ENDS)}")
        if self.resume and not self.keeps_products:
            raise InvalidInput("resume needs the journal, which only a report of a single process keeps")
        self.torch_dtype, self.torch_device  # noqa: B018  # they raise if there is no such type or device

    @property
    def keeps_products(self) -> bool:
        """Whether products are kept on disk until the report is written."""
        return self.journal and self.group is None

    @property
    def is_first_process(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.group is None or self.group.rank() == 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        import torch

        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        # Those of eight bits and fewer are for storage: torch does not compute in them.
        fits = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2
        if self.dtype is not None and not fits:
            kinds = "'float32', 'float64', 'bfloat16'"
            raise InvalidInput(f"dtype={self.dtype!r} must be a floating-point type such as {kinds}")
        return dtype

    @property
    def torch_device(self) -> torch.device | None:
        import torch

        try:
            if self.device is None:
                return None
            tried = torch.zeros(1, device=self.device)
            tried.tolist()  # there is nothing to be read on the device meta
            return tried.device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            first_line = (str(error).strip().splitlines() or [""])[0]
            raise InvalidInput(
                f"device={str(self.device)!r} cannot be used here ({type(error).__name__}: {first_line}): "
                "leave it out to stay where the model is"
            ) from error

    def fitted(self, num_parameters: int) -> Options:
        """The options for a model of so many parameters: a Lanczos run takes no more steps than that."""
        if self.k > num_parameters:
            raise InvalidInput(f"k={self.k} must be between 1 and {num_parameters}, the number of parameters")
        return replace(
            self,
            num_steps=min(self.num_steps, num_parameters),
            num_pairs=max(self.k, min(self.num_pairs, num_parameters)),
        )

    def settings(self) -> dict[str, Any]:
        """The options that the numbers depend on, by name."""
        relevant = [option.name for option in fields(self) if option.metadata["group"] in (DATA, WORK)]
        values = {name: getattr(self, name) for name in relevant}
        return values | {"params": repr(self.params) if callable(self.params) else self.params}


def _checked(option: Field[Any], value: Any) -> Any:
    """The value of an option, if it is in range; numbers as plain ones, which JSON knows, patterns as a tuple."""
    about = option.metadata
    if value is None and option.default is None:
        return None
    if "least" in about:
        return _in_range(option.name, value, about["least"], about["or_zero"])
    if "positive" in about:
        return _positive(option.name, value)
    if option.name == "params" and not isinstance(value, str) and not callable(value):
        return tuple(value)  # an iterator would be run through only once
    if option.name == "weights" and not callable(value):
        return tuple(map(float, value))
    return value


def _in_range(name: str, value: Any, least: int, or_zero: bool) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise InvalidInput(f"{name}={value!r} must be an integer of at least {least}") from None
    if count > sys.maxsize:
        raise InvalidInput(f"{name}={count} must be at most {sys.maxsize}")
    if count < least and not (or_zero and count == 0):
        raise InvalidInput(f"{name}={count} must be at least {least}{', or 0 for none' if or_zero else ''}")
    return count


def _positive(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise InvalidInput(f"{name}={value!r} must be a positive and finite number")
    return number
