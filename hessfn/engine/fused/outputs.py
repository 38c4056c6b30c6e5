"""The outputs of a model, in the graph of its loss: there a Gauss-Newton product is cut in two.

The Gauss-Newton matrix ``J' H J`` is the Hessian of a loss without what is curved in its outputs: ``J`` their Jacobian,
``H`` the Hessian of the criterion by them. So a product takes the tangents of the loss as the Hessian's does. From the
outputs on down it pulls the tangents ``H J v`` of the slopes back, and not the slopes.

Outputs are marked in the graph of a loss. Logits go into their cross-entropy with the matrix product that makes them,
and are outputs all the same: ``head`` is that operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from hessfn.core.func import gradients
from hessfn.core.torch_private import current_dispatch_mode
from hessfn.engine.fused import chunks, cross_entropy
from hessfn.engine.fused.cross_entropy import Maybe, Triple, Wanted
from hessfn.engine.fused.logits import Labels, Logits
from hessfn.engine.fused.operation import Fused, call, is_followed, sees_operations
from hessfn.engine.meta_shapes import on_meta
from hessfn.engine.recorder import Recorder, Unsupported


def output(x: Tensor) -> Tensor:
    """The same tensor, which the recorder marks as an output.

    Raises:
        Unsupported: nobody records, or somebody who would not see the mark.
    """
    if not isinstance(current_dispatch_mode(), Recorder):
        raise Unsupported("an output is marked in a recorded graph alone")
    found: Tensor = _Output.apply(x) if is_followed(x) else call(output, output, on_meta, x)
    return found


class _Output(Fused):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return call(output, output, on_meta, x)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return g


def head(x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe) -> Tensor:
    """As ``cross_entropy.losses``, of logits that are outputs."""
    return cross_entropy.losses(x, weight, bias, target, part, smooth)


def curvatures(
    x: Tensor, weight: Maybe, bias: Maybe, target: Tensor, part: Tensor, smooth: Maybe, g: Tensor, wanted: Wanted,
    dx: Maybe, dweight: Maybe, dbias: Maybe, dg: Maybe,
) -> Triple:  # fmt: skip
    """As ``cross_entropy.tangents_of_gradients``, but for what is curved in the logits: ``J' H J`` of the head."""
    args = x, weight, bias, target, part, smooth, g, wanted, dx, dweight, dbias, dg
    if sees_operations() or is_followed(*args):
        return _by_definition(*args)
    return call(curvatures, _kernel, cross_entropy.look_of_gradients, *args)  # type: ignore[no-any-return]


def _by_definition(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, g: Any, wanted: Any,
    dx: Any, dweight: Any, dbias: Any, dg: Any,
) -> Any:  # fmt: skip
    z, change = cross_entropy.logits(x, weight, bias), cross_entropy.change_of(x, weight, dx, dweight, dbias)
    of_logits = z, None, None, target, part, smooth, g, (True, False, False), change.expand_as(z), None, None, dg
    image = cross_entropy.tangents_of_gradients(*of_logits)[0]
    assert image is not None
    return tuple(cross_entropy.pulled_back(image, x, weight, wanted))


def _kernel(
    x: Any, weight: Any, bias: Any, target: Any, part: Any, smooth: Any, g: Any, wanted: Any,
    dx: Any, dweight: Any, dbias: Any, dg: Any,
) -> Any:  # fmt: skip
    z, labels = Logits(x, weight, bias), Labels(target, part, smooth)
    return tuple(chunks.curvatures(z, labels, g, Logits(dx, dweight, dbias), dg, wanted))


class Cut:
    """Two halves of a graph that is run on dual numbers: outputs begin anew, so that the criterion's half is its own.

    ``instead`` says what takes the place of marked operations while the graph is run. ``inner`` is what the criterion's
    half depends on.
    """

    def __init__(self) -> None:
        self.inner: list[Tensor] = []
        self._outer: list[Tensor] = []
        self._images: list[Callable[[Tensor], Sequence[Maybe]]] = []
        self.instead: dict[Any, Callable[..., Tensor]] = {output: self._output, head: self._head}

    def _output(self, x: Tensor) -> Tensor:
        self._outer.append(fwAD.unpack_dual(x).primal)
        self._images.append(lambda slope: [fwAD.unpack_dual(slope).tangent])
        return self._anew(x)

    def _head(self, x: Tensor, weight: Tensor, bias: Maybe, *labels: Any) -> Tensor:
        pairs = [(None, None) if p is None else fwAD.unpack_dual(p) for p in (x, weight, bias)]
        primals, tangents = zip(*pairs, strict=True)
        wanted = tuple(p is not None and p.requires_grad for p in primals)
        self._outer.extend(p for p in primals if p is not None)
        plain = cross_entropy.losses(x, weight, bias, *labels)

        def images(slope: Tensor) -> list[Maybe]:
            g, dg = fwAD.unpack_dual(slope)
            args: Any = *primals, *labels, g, wanted, *tangents, dg
            found = curvatures(*args)
            return [image for image, p in zip(found, primals, strict=True) if p is not None]

        self._images.append(images)
        return self._anew(plain)

    def _anew(self, x: Tensor) -> Tensor:
        primal, tangent = fwAD.unpack_dual(x)
        leaf = primal.detach().requires_grad_()
        self.inner.append(leaf if tangent is None else fwAD.make_dual(leaf, tangent.detach()))
        return self.inner[-1]

    def images(self, slopes: Sequence[Tensor]) -> list[Maybe]:
        """The tangents of slopes by what is ``inner``, as those of the outputs."""
        with torch.no_grad():
            return [image for of, slope in zip(self._images, slopes, strict=True) for image in of(slope)]

    def pulled_back(self, images: list[Maybe], by: list[Tensor]) -> list[Tensor]:
        """``J' u``, where no tangents are followed any more."""
        pairs = [(x, u) for x, u in zip(self._outer, images, strict=True) if u is not None and x.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in by]
        outputs, directions = zip(*pairs, strict=True)
        return gradients(outputs, by, directions)
