"""Attention in compiled code, against its definition in float64 and dense Hessians by torch's own operations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nets import needs_compiler
from test_fused import HOWS, LENGTH, Attending, truth
from torch import Tensor, nn

import hessfn as hf
from hessfn.core.errors import OutOfMemory
from hessfn.engine.flash_attention import kernel, lowering
from hessfn.engine.fused import attention
from hessfn.engine.fused import attention_definition as definition

pytestmark = needs_compiler
SCALE = 0.3


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HESSFN_NATIVE", raising=False)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(rows: int, depth: int, seed: int) -> Tensor:
    """(2, 3, rows, depth), as a projection to all heads leaves it: no head lies whole in memory."""
    return drawn(2, rows, 3, depth, seed=seed).transpose(1, 2)


def masked(rows: int, columns: int) -> Tensor:
    mask = drawn(rows, columns, seed=9)
    mask[mask < -0.5] = -math.inf
    mask[3] = -math.inf  # a row that attends to nothing
    return mask


CASES: dict[str, tuple[int, int, int, int, bool, Tensor | None]] = {
    "causal": (130, 130, 64, 64, True, None),
    "more columns than rows": (70, 150, 32, 32, False, None),
    "causal, more rows": (150, 70, 16, 16, True, None),
    "one row, depths of several registers": (1, 65, 80, 48, False, None),
    "mask": (100, 90, 16, 32, False, masked(100, 90)),
    "mask for each sample": (100, 90, 16, 32, False, torch.stack([masked(100, 90), drawn(100, 90)])[:, None]),
    "mask that is the same for all rows": (100, 90, 16, 32, False, drawn(90).expand(100, 90)),
}


@pytest.mark.parametrize(("rows", "columns", "depth", "out_depth", "causal", "mask"), CASES.values(), ids=CASES)
def test_each_operation_is_its_definition(
    rows: int, columns: int, depth: int, out_depth: int, causal: bool, mask: Tensor | None
) -> None:
    q, dq = heads(rows, depth, 1), heads(rows, depth, 2)
    k, dk = heads(columns, depth, 3), heads(columns, depth, 4)
    v, dv = heads(columns, out_depth, 5), heads(columns, out_depth, 6)
    g, dg = heads(rows, out_depth, 7), heads(rows, out_depth, 8)
    seen = None if mask is None else mask.double()
    how = seen, causal, SCALE
    wide = [x.double() for x in (q, k, v)]
    out, lse = definition.attention(*wide, *how)
    dout, dlse = definition.tangent(*wide, *how, out, lse, *(x.double() for x in (dq, dk, dv)))
    plain = definition.gradient(*wide, *how, out, lse, g.double())
    along = out, lse, g.double(), dq.double(), dk.double(), dv.double(), dout, dlse, dg.double()
    moved = definition.tangent_of_gradient(*wide, *how, *along)

    given = q, k, v, mask, causal, SCALE
    known = [x.float() for x in (out, lse)]
    rest = [x.float() for x in along]
    expected: dict[Any, tuple[Any, tuple[Any, ...]]] = {
        "attention": (lowering.attention(*given), (out, lse)),
        "tangent": (lowering.tangent(*given, *known, dq, dk, dv), (dout, dlse)),
        "attention with tangent": (lowering.attention_with_tangent(*given, dq, dk, dv), (out, lse, dout, dlse)),
        "gradient": (lowering.gradient(*given, *known, g), plain),
        "its tangent": (lowering.tangent_of_gradient(*given, *rest), moved),
        "gradient with tangent": (lowering.gradient_with_tangent(*given, *rest), (*plain, *moved)),
    }
    for name, (found, right) in expected.items():
        for i, (mine, true) in enumerate(zip(found, right, strict=True)):
            assert mine.shape == true.shape and mine.is_contiguous(), (name, i)
            finite = true.isfinite()  # the log-sum-exp of nothing is infinite
            assert torch.equal(mine.isfinite(), finite), (name, i)
            mine, true = mine[finite].double(), true[finite]
            assert (mine - true).norm() < 2e-6 * true.norm(), (name, i, (mine - true).norm() / true.norm())


def test_what_is_not_a_number_stays_none() -> None:
    q, k, v = heads(70, 16, 1), heads(70, 16, 2), heads(70, 16, 3)
    q[1, 2, 5, 3] = math.nan
    out, _ = lowering.attention(q, k, v, None, True, SCALE)
    assert out[1, 2, 5].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


def test_weights_far_below_the_largest_are_zero() -> None:
    q, k = 60 * heads(70, 16, 1), 60 * heads(70, 16, 2)
    v = heads(70, 16, 3)
    out, lse = lowering.attention(q, k, v, None, False, SCALE)
    expected = definition.attention(q.double(), k.double(), v.double(), None, False, SCALE)
    assert (out - expected[0]).norm() < 1e-4 * expected[0].norm()
    assert (lse - expected[1]).norm() < 1e-6 * expected[1].norm()


class Deep(Attending):
    """Heads as deep as a register is wide."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.qkv, self.out = nn.Linear(8, 96), nn.Linear(32, 2)


@pytest.mark.parametrize("how", HOWS)
def test_products_are_those_of_the_dense_hessian(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WORTH", 1)
    calls: list[str] = []
    call = kernel.call
    monkeypatch.setattr(kernel, "call", lambda *args: calls.append(",".join(args[-1])) or call(*args))
    torch.manual_seed(0)
    mask = how.get("attn_mask")
    net = Deep(**{**how, "attn_mask": mask.float()} if mask is not None and mask.dtype != torch.bool else how)
    batch = drawn(2, LENGTH, 8, seed=3), drawn(2, LENGTH, 2, seed=4)
    loss, params = hf.functionalize(net, nn.MSELoss())
    wide_loss, wide_params = hf.functionalize(net.double(), nn.MSELoss())
    expected = truth(wide_loss, wide_params, tuple(x.double() for x in batch))
    net.float()
    params = {name: x.float() for name, x in params.items()}
    for made in (hf.hvp(loss, params, batch, trace_after=0), hf.linearized_hvp(loss, params, batch)):
        before = len(calls)
        found = hf.dense(made, params)
        assert len(calls) > before
        assert (found.double() - expected).norm() < 1e-5 * expected.norm()
        before = len(calls)
        assert (hf.dense(made, params, batch_size=64).double() - expected).norm() < 1e-5 * expected.norm()
        assert len(calls) == before  # under vmap it is the definition


def test_where_it_is_switched_off_it_is_tiles_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    given = heads(70, 16, 1), heads(70, 16, 2), heads(70, 16, 3), None, True, SCALE
    monkeypatch.setenv("HESSFN_NATIVE", "0")
    assert all(map(torch.equal, lowering.attention(*given), attention.attention(*given)))


def test_what_the_kernel_is_not_for_is_tiles_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(70, 16, 1), heads(70, 16, 2), heads(70, 16, 3)
    assert kernel.is_profitable(q, k, v, None)
    assert not kernel.is_profitable(q.double(), k.double(), v.double(), None)
    assert not kernel.is_profitable(q[..., :9], k[..., :9], v, None)
    assert not kernel.is_profitable(q, k, v, drawn(70, 70).double())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 13)
    assert not kernel.is_profitable(q, k, v, None)  # six heads: more than half of the threads would have none


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        attention = staticmethod(lambda *_: 0)

    monkeypatch.setattr(kernel.KERNEL, "library", Full)
    with pytest.raises(OutOfMemory, match="no memory for the tiles of 70 columns"):
        lowering.attention(heads(70, 16, 1), heads(70, 16, 2), heads(70, 16, 3), None, True, SCALE)
