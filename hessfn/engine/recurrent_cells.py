"""Cells of recurrent layers by their definitions: the fused ones of GPUs have no rule in forward mode."""

from __future__ import annotations

from torch import Tensor


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gates = sum((b for b in biases if b is not None), start=x + h)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c, gates  # the last is what the fused one keeps for its derivative


def gru_cell(
    x: Tensor, h: Tensor, state: Tensor, x_bias: Tensor | None = None, h_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x, h = (part if bias is None else part + bias for part, bias in ((x, x_bias), (h, h_bias)))
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, 1), h.chunk(3, 1)
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    return new + (xz + hz).sigmoid() * (state - new), x
