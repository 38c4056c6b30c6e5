"""Why a mode cannot differentiate a loss, in the words of who wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hessfn.core.errors import HessfnError

# What torch says, and what it means.
_MEANINGS: dict[str, str] = {
    r"Trying to use forward AD with (?:aten::)?(\w+)": "torch has no derivative rule in forward mode for {0}",
    r"[Dd]erivative for '?(?:aten::)?(\w+)'? is not implemented": "torch has no second derivative of {0}",
    r"ZeroTensors are immutable": "a derivative rule of torch writes into a zero that it must not change",
    r"once_differentiable|differentiate twice a function": "what it computes can be differentiated once only",
    r"jvp staticmethod|jvp function": "its autograd.Function has no jvp, which forward mode needs",
    r"setup_context|custom_function_call": "torch.func does not take its autograd.Function (or checkpointing)",
    r"requires_grad_\(\)|autograd\.functional": "torch.func does not take losses that call requires_grad_()",
    r"torch\.autograd\.grad|does not require grad and does not have a grad_fn|not have been used in the graph": (
        "torch.func does not see what it differentiates by torch.autograd.grad"
    ),
    r"Cannot access data pointer|Cannot access storage": "torch.func cannot show the values of a tensor",
    r"saved.tensors?.hooks|[Cc]heckpoint": "torch.func does not take checkpointing",
    r"[Ii]nference [Tt]ensor|Inference tensors": "it computes something under torch.inference_mode",
    r"no attribute '_?backward_hooks|[Bb]ackward hooks?": "torch.func does not take its backward hooks",
    r"leaf Variable that requires grad is being used in an in-place": "it changes its parameters in place",
    r"modified by an inplace operation": "it changes in place what its gradient needs",
    r"ScriptFunction|ScriptModule|jit": "torch.func does not take scripted code: give the Python model",
    r"[Ss]parse": "torch has no rule for its sparse tensors",
    r"out of memory|can't allocate memory": "there is not memory enough for it",
}
_LENGTH = 160


def reason(error: BaseException) -> str:
    """One short line.

    >>> reason(NotImplementedError("Trying to use forward AD with cdist that does not support it because ..."))
    'torch has no derivative rule in forward mode for cdist'
    """
    message = str(error) or type(error).__name__
    if isinstance(error, HessfnError):  # it is in these words
        return message.splitlines()[0]
    for symptom, meaning in _MEANINGS.items():
        found = re.search(symptom, message)
        if found:
            return meaning.format(*found.groups())
    line = " ".join(message.splitlines()[0].split()) or type(error).__name__
    return line if len(line) <= _LENGTH else f"{line[: _LENGTH - 4]} ..."


def listed(reasons: Iterable[tuple[str, str]], separator: str = "; ") -> str:
    """Modes and why each is not taken, with no reason told twice.

    >>> listed([("forward", "it counts"), ("reverse", "it counts"), ("traced", "it branches")])
    'forward, reverse: it counts; traced: it branches'
    """
    modes: dict[str, list[str]] = {}
    for mode, why in reasons:
        modes.setdefault(why, []).append(mode)
    return separator.join(f"{', '.join(names)}: {why}" for why, names in modes.items())
