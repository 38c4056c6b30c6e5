"""From a loss to a matvec: the Hessian, its mean over a data set, the Gauss-Newton matrix, the Fisher matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import RandomSampler

from hessfn import tree
from hessfn.graph import clean
from hessfn.tree import MatVec, Tree

with warnings.catch_warnings():
    # torch imports this at the first forward-mode derivative and then warns of its own use of torch.jit.
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp  # noqa: F401

Loss = Callable[..., Tensor]
_SAME_DATA = (
    "every product needs the same data in the same order, or there is no matrix. Use DataLoader(..., shuffle=False) "
    "without random augmentation, or batches = list(loader) once"
)
Product = Callable[[Tree, tuple[Any, ...], Tree], Tree]


def hvp(loss: Loss, params: Tree, *args: Any, mode: str = "auto") -> MatVec:
    """Hessian-vector products of ``loss(params, *args)`` by its first argument, forward-over-reverse.

    ``H v = d/dt grad loss(params + t v)`` at ``t = 0``. Nothing is kept between products.

    Args:
        loss: a function to a scalar tensor.
        params: a tree of floating-point tensors, where the Hessian is taken.
        args: what else the loss takes, such as a batch.
        mode: how. ``"auto"`` takes the first way of this list that the loss's operations allow, and says so in one
            warning where it is not exact forward-over-reverse:

            - ``"traced"``: forward-over-reverse through one cleaned trace of the loss, made at the first product (see
              :func:`hessfn.graph.clean`); the fastest, and right on nearly every net. Not within ``vmap`` and such.
            - ``"forward"``: forward-over-reverse through the loss itself: ``jvp`` of a ``vjp``-built gradient.
            - ``"reverse"``: ``vjp`` of the gradient, exact as well, with the whole graph in memory.
            - ``"double_backward"``: ``torch.autograd.grad`` twice, for what ``torch.func`` refuses.
            - ``"difference"``: central differences of gradients, for what has no second derivative in torch.

    Returns:
        A matvec on trees like ``params``.

    Raises:
        ValueError: the loss is not one finite number, or draws random numbers, or a vector does not match ``params``.

    Source: Pearlmutter (1994).

    >>> matvec = hvp(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    >>> matvec(torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    product = _product(loss, mode)

    def matvec(v: Tree) -> Tree:
        return product(params, args, tree.aligned(v, params))

    return matvec


def mean_hvp(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | Callable[[Any], float] | None = None,
    mode: str = "auto",
) -> MatVec:
    """Products with the mean Hessian over batches, ``sum_b w_b H_b v / sum_b w_b``; one batch is in memory at a time.

    Args:
        loss: ``loss(params, batch)``, a mean over its batch.
        params: a tree of tensors. Batches are moved to its device.
        batches: gives the same batches at each pass: a list, a ``DataLoader`` that does not shuffle.
        weights: one number a batch, or a function of the batch, such as its number of tokens. By default the size of
            the batch (length of its first tensor), so that the result is the Hessian of the mean over all samples.
        mode: as for :func:`hvp`.

    Raises:
        ValueError: there is no batch, ``batches`` can be run through only once, shuffles, or changes between products.

    >>> matvec = mean_hvp(lambda w, x: (w * x).square().sum(1).mean(), torch.ones(1), [torch.ones(3, 1), torch.zeros(1, 1)])
    >>> matvec(torch.ones(1))
    tensor([1.5000])
    """
    _check_batches(batches)
    product = _product(loss, mode)
    first_pass: list[Tensor] = []
    device = tree.leaves(params)[0].device

    def matvec(v: Tree) -> Tree:
        v = tree.aligned(v, params)
        total, total_weight, this_pass = None, 0.0, []
        for index, batch in enumerate(_iterate(batches)):
            batch = tree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
            weight = _weight(weights, index, batch)
            try:
                part = product(params, (batch,), v)
            except ValueError as error:
                raise ValueError(f"batch {index}: {error}") from error
            total = tree.scale(weight, part) if total is None else tree.add(total, part, weight)
            total_weight = total_weight + weight
            this_pass.append(_fingerprint(batch))
        if total is None:
            raise ValueError("there is no batch: the iterable of batches is empty")
        if not first_pass:
            first_pass.extend(this_pass)
        _check_same(first_pass, this_pass)
        return tree.scale(1 / total_weight, total)

    return matvec


def ggnvp(
    forward: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], params: Tree, batch: Any
) -> MatVec:
    """Products with the generalized Gauss-Newton matrix ``J' H_out J``.

    ``J`` is the Jacobian of the outputs by the parameters, ``H_out`` the Hessian of the criterion by the outputs: positive
    semidefinite where the criterion is convex in them. It is the Hessian when the model is linear in its parameters.

    Args:
        forward: ``forward(params, inputs)`` to a tensor or a tree of them, such as :func:`hessfn.stateless` returns.
        criterion: ``criterion(outputs, targets)`` to a scalar.
        params: a tree of tensors.
        batch: ``(inputs, targets)``.

    Source: Schraudolph (2002).

    >>> x = torch.tensor([[1.0, 2.0]])
    >>> matvec = ggnvp(lambda w, x: x @ w, lambda out, y: (out - y).square().sum(), torch.zeros(2), (x, torch.ones(1)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    inputs, targets = batch

    def outputs(p: Tree) -> Any:
        return forward(p, inputs)

    def matvec(v: Tree) -> Tree:
        v = tree.aligned(v, params)
        with sdpa_kernel(SDPBackend.MATH):
            out, pullback = torch.func.vjp(outputs, params)
            # Reverse mode: the criterion is cheap, and the common ones lack a forward rule.
            _, curvature = torch.func.vjp(torch.func.grad(lambda o: criterion(o, targets)), out)
            return pullback(curvature(_pushforward(outputs, params, v))[0])[0]

    return matvec


def fvp(
    forward: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], params: Tree, batch: Any
) -> MatVec:
    """Products with the empirical Fisher matrix ``1/B sum_i g_i g_i'``, ``g_i`` the gradient of sample ``i``'s loss.

    Arguments as :func:`ggnvp`; samples lie along the first axis of outputs and targets, and each sample's output must be
    a function of that sample alone. With targets drawn from the model's own predictions it is a Monte-Carlo estimate of
    the Fisher matrix itself.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> square = lambda out, y: (out - y).square().mean()
    >>> matvec = fvp(lambda w, x: x @ w, square, torch.zeros(2), (x, torch.ones(2)))
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([2., 4.])
    """
    inputs, targets = batch

    def alone(output: Any, target: Any) -> Tensor:
        one = tree.map(lambda leaf: leaf.unsqueeze(0), (output, target))
        return criterion(*one)

    def losses(p: Tree) -> Tensor:
        return torch.func.vmap(alone)(forward(p, inputs), targets)

    def matvec(v: Tree) -> Tree:
        v = tree.aligned(v, params)
        with sdpa_kernel(SDPBackend.MATH):
            each, pullback = torch.func.vjp(losses, params)
            return pullback(_pushforward(losses, params, v) / each.numel())[0]

    return matvec


def _pushforward(function: Callable[[Tree], Any], point: Tree, v: Tree) -> Any:
    """``J v``; without forward rules as the derivative of ``u -> J' u``, which is linear, so any ``u`` will do."""
    try:
        return torch.func.jvp(function, (point,), (v,))[1]
    except (RuntimeError, NotImplementedError):
        out, pullback = torch.func.vjp(function, point)
        return torch.func.vjp(lambda u: pullback(u)[0], tree.map(torch.zeros_like, out))[1](v)[0]


# The ways: each takes a loss to product(params, args, v).

Product = Callable[[Tree, tuple[Any, ...], Tree], Tree]


def _forward(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        return torch.func.jvp(lambda p: _gradient(loss, p, args), (params,), (v,))[1]

    return product


def _reverse(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        return torch.func.vjp(lambda p: _gradient(loss, p, args), params)[1](v)[0]

    return product


def _double_backward(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        leaves, gradient = _autograd(loss, params, args, create_graph=True)
        pairs = [(g, d) for g, d in zip(gradient, tree.leaves(v), strict=True) if g.requires_grad]
        if not pairs:
            return tree.map(torch.zeros_like, params)
        outputs, directions = zip(*pairs, strict=True)
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        return tree.unflatten(torch.autograd.grad(outputs, leaves, directions, **options), params)

    return product


def _difference(loss: Loss, *_: Any) -> Product:
    return lambda params, args, v: _two_differences(loss, params, args, v)[0]


def _traced(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Product:
    return _forward(clean(loss, params, *args))


WAYS: dict[str, Callable[..., Product]] = {
    "traced": _traced,
    "forward": _forward,
    "reverse": _reverse,
    "double_backward": _double_backward,
    "difference": _difference,
}


def _gradient(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Tree:
    value, pullback = torch.func.vjp(lambda p: loss(p, *args), params)
    return pullback(torch.ones_like(value))[0]


def _autograd(loss: Loss, params: Tree, args: tuple[Any, ...], create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params)]
    with torch.enable_grad():
        value = loss(tree.unflatten(leaves, params), *args)
        options: dict[str, Any] = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        return leaves, list(torch.autograd.grad(value, leaves, **options))


def _two_differences(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> tuple[Tree, Tensor]:
    """Central differences with steps h and h/2, extrapolated; and how far apart they were, relative to the product."""
    eps = max(torch.finfo(leaf.dtype).eps for leaf in tree.leaves(params))
    size, length = tree.norm(params), tree.norm(v)
    # Relative to the parameters, between what truncation (h^4) and rounding (eps / h) would like.
    step = eps**0.25 * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)

    def central(h: Tensor) -> Tree:
        plus, minus = (
            tree.unflatten(_autograd(loss, tree.add(params, v, c), args, create_graph=False)[1], params) for c in (h, -h)
        )
        return tree.scale(1 / (2 * h), tree.add(plus, minus, -1.0))

    coarse, fine = central(step), central(step / 2)
    apart = tree.add(fine, coarse, -1.0)
    return tree.add(fine, apart, 1 / 3), tree.norm(apart) / tree.norm(fine)


class Way(NamedTuple):
    """How products are made: the mode, why no earlier one would do, and the relative error if it is a difference."""

    mode: str
    reason: str
    error: float


def choose_way(loss: Loss, params: Tree, *args: Any) -> Way:
    """The mode that ``hvp(mode="auto")`` takes for this loss, and why; at the cost of one product.

    >>> choose_way(lambda w: (w**4).sum(), torch.ones(3))
    Way(mode='traced', reason='', error=0.0)
    """
    v = tree.map(torch.ones_like, params)
    with sdpa_kernel(SDPBackend.MATH):
        return _first(loss, params, args, v, "auto")[1]


def _product(loss: Loss, mode: str) -> Product:
    """The product in a mode, which finds its way at the first call for arguments of their shapes."""
    if mode != "auto" and mode not in WAYS:
        raise ValueError(f"mode={mode!r} must be 'auto' or one of {', '.join(map(repr, WAYS))}")
    found: dict[Any, Product] = {}
    said: set[str] = set()

    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        if torch.compiler.is_compiling():
            return WAYS["forward" if mode == "auto" else mode](loss)(params, args, v)
        shapes = _shapes((params, args))
        with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have neither forward rules nor double backward
            if shapes in found:
                return found[shapes](params, args, v)
            found[shapes], way, result = _first(loss, params, args, v, mode)
        if way.reason and way.mode not in {"traced", "forward", *said}:
            said.add(way.mode)
            warnings.warn(_announce(way), stacklevel=3)
        return result

    return product


def _shapes(arguments: Any) -> Any:
    """What a trace is good for: the structure, the shapes and dtypes of tensors, the values of all else."""
    kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x) for x in tree.leaves(arguments)]
    return (*tree.names(arguments), *kinds)


def _first(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, mode: str) -> tuple[Product, Way, Tree]:
    _check_loss(loss, params, args)
    reasons: list[str] = []
    for name in WAYS if mode == "auto" else (mode,):
        try:
            product = WAYS[name](loss, params, args)
            result = product(params, args, v)
        except (RuntimeError, NotImplementedError) as error:
            if mode != "auto":
                raise
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        error = float(_two_differences(loss, params, args, v)[1]) if name == "difference" else 0.0
        return product, Way(name, "; ".join(reasons), error), result
    raise RuntimeError("this loss cannot be differentiated twice in any way:\n" + "\n".join(reasons))


def _announce(way: Way) -> str:
    exact = f"is not exact: its relative error is about {way.error:.1g}" if way.error else "is exact but may cost more"
    return f"Hessian-vector products in mode {way.mode!r}, which {exact}. Not possible were: {way.reason}"


def _check_loss(loss: Loss, params: Tree, args: tuple[Any, ...]) -> None:
    before = torch.get_rng_state()
    with torch.no_grad():
        value = loss(params, *args)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise ValueError(
            "the loss draws random numbers, so it is not a function of its parameters: call model.eval(), or draw "
            "the numbers beforehand and pass them in the batch"
        )
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be one real number, not {found}: reduce it, for example by its mean")
    if tree.known(value.isfinite().all()) is False:
        raise ValueError(f"the loss is {value.item()} at these parameters: curvature needs a finite one")


def _check_batches(batches: Iterable[Any]) -> None:
    if isinstance(batches, Iterator):
        raise ValueError("batches can be run through only once, but every product is a pass: give list(batches) instead")
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError("there is no batch: the iterable of batches is empty")
    if isinstance(getattr(batches, "sampler", None), RandomSampler):
        raise ValueError(f"this DataLoader shuffles: {_SAME_DATA}")


def _iterate(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Sequence):
        return iter(batches)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a seed for its workers from the global generator
        return iter(batches)


def _weight(weights: Sequence[float] | Callable[[Any], float] | None, index: int, batch: Any) -> float | Tensor:
    if callable(weights):
        return weights(batch)
    if weights is None:
        return len(next(x for x in tree.leaves(batch) if isinstance(x, Tensor)))
    if index >= len(weights):
        raise ValueError(f"weights has {len(weights)} entries, but there is a batch {index}: give one for each batch")
    return weights[index]


def _fingerprint(batch: Any) -> Tensor:
    """Numbers that almost surely differ where the data does; cheap beside a product."""
    return torch.stack([tree.wide(x).sum() for x in tree.leaves(batch) if isinstance(x, Tensor)])


def _check_same(first_pass: list[Tensor], this_pass: list[Tensor]) -> None:
    same = len(first_pass) == len(this_pass)
    for a, b in zip(first_pass, this_pass, strict=False):
        same = same and a.shape == b.shape and tree.known((a == b).all()) is not False
    if not same:
        raise ValueError(f"the batches of this pass are not those of the first one: {_SAME_DATA}")
