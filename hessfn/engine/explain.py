"""What an error of torch means for whoever wrote the loss: the cause, and what to do about it."""

from __future__ import annotations

import re


def explain(error: BaseException) -> str:
    """The error in the words of the loss; of one that is not known its kind and its first sentence.

    >>> explain(NotImplementedError("Trying to use forward AD with segment_reduce that does not support it"))
    'torch has no derivative of segment_reduce in forward mode'
    """
    message = str(error)
    for symptom, meaning in _MEANINGS.items():
        found = re.search(symptom, message)
        if found is not None:
            return meaning.format(*found.groups())
    first = re.split(r"(?<=[.:;])\s|\n", message.strip(), maxsplit=1)[0].rstrip(".:;")
    return f"{type(error).__name__}: {first[:120]}" if first else type(error).__name__


READS_VALUES = (
    "it branches on, or takes out, the value of a tensor that is computed from parameters or floating-point data "
    "(if, .item(), float()): write torch.where; integers and masks may decide"
)
SHAPED_BY_VALUES = (
    "the shape of a result depends on values computed from parameters or floating-point data (x[x > 0], nonzero): "
    "multiply by the mask; integers and masks may decide"
)
_WRITES = "it writes into an argument, or into a tensor from outside ({}): let it write into a clone"
_VALUES_OF = "it reads the memory of a tensor outside of torch's operations: keep to these"
_MEANINGS = {
    r"changes a tensor that is not its own \((?:aten\.)?([\w.]+?)(?:\.default)?\)": _WRITES,
    r"(?i)forward AD with (\w+?)(?:_cachemask)? that does not support it": (
        "torch has no derivative of {} in forward mode"
    ),
    r"derivative for (?:aten::)?'?(\w+?)'? is not implemented": "torch has no second derivative of {}",
    r"HigherOrderOperator (\w+)": "it uses torch.{}, which no trace follows: write if, for, or torch.where",
    r"(?i)\bnested\b|NestedInt|jagged": "it has nested (jagged) tensors: pad them, with a mask",
    r"Inference tensors": "it computes something where derivatives are off (torch.inference_mode)",
    r"does not require grad and does not have a grad_fn": (
        "it differentiates by something that its value does not depend on: let that require gradients where it is made"
    ),
    r"appears to not have been used in the graph": (
        "it differentiates by something that was not used: allow_unused=True gives zeros, with materialize_grads=True"
    ),
    r"(?i)dynamo|torch\.compile|symbolically trac": "it calls what torch.compile made: give what was compiled",
    r"(?i)torch\.?script|jitted|torch\.jit": "it calls what torch.jit made: give the module from before",
    r"(?i)sparse": "it has sparse tensors, which no trace follows: make them dense",
    r"data pointer|doesn't have storage|Python storage": _VALUES_OF,
    r"(?i)quantiz": "it has quantized tensors, which have no derivatives: dequantize them first",
}
