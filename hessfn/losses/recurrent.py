"""Recurrent layers on a GPU: cuDNN's kernels of these have no second derivatives, and want all weights in one piece."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hessfn.core.torch_private import without_cudnn


class WithoutCudnn(TorchFunctionMode):
    """Within it recurrent layers, and only these, are computed by torch's own kernels."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        with without_cudnn():
            return func(*args, **(kwargs or {}))


_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
