"""The ways to differentiate a loss twice, and the ladder that finds the first one its operations allow."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessfn import memory, tree
from hessfn.definitions import by_definition
from hessfn.graph import Untraceable, clean, on_cpu, tensors
from hessfn.linear import derivative
from hessfn.native import by_tiles
from hessfn.probes import gaussian
from hessfn.tree import Tree
from hessfn.turns import turn

with warnings.catch_warnings():
    # torch imports this at the first forward-mode derivative and then warns of its own use of torch.jit.
    warnings.simplefilter("ignore", FutureWarning)
    import torch._decomp.decompositions_for_jvp

Loss = Callable[..., Tensor]
vjp: Callable[..., Any] = torch.func.vjp  # as it is annotated, it always returns an auxiliary output too
Product = Callable[[Tree, tuple[Any, ...], Tree], Tree]


# One way a function, from a loss to its product.


def _forward(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        return torch.func.jvp(lambda p: _gradient(loss, p, args), (params,), (v,))[1]

    return product


def _reverse(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        return vjp(lambda p: _gradient(loss, p, args), params)[1](v)[0]

    return product


def _double_backward(loss: Loss, *_: Any) -> Product:
    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        leaves, gradient = plain_gradient(loss, params, args, create_graph=True)
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
    graph = clean(loss, params, *args)
    try:
        module = derivative(graph, params, args)
    except Untraceable:  # a derivative rule looks at values
        return _forward(graph)
    if on_cpu((params, args)):
        module = by_tiles(module)
    memory.accumulate(module)
    return lambda params, args, v: tree.unflatten(module(*tensors((params, args, v))[0]), params)


# In the order of preference.
WAYS: dict[str, Callable[..., Product]] = {
    "traced": _traced,
    "forward": _forward,
    "reverse": _reverse,
    "double_backward": _double_backward,
    "difference": _difference,
}


def _gradient(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Tree:
    value, pullback = vjp(lambda p: loss(p, *args), params)
    return pullback(torch.ones_like(value))[0]


def plain_gradient(
    loss: Loss, params: Tree, args: tuple[Any, ...], create_graph: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The leaves and the gradient by them, by plain autograd, which also does what ``torch.func`` refuses."""
    leaves = [leaf.detach().requires_grad_() for leaf in tree.leaves(params)]
    with torch.enable_grad():
        value = loss(tree.unflatten(leaves, params), *args)
        options: dict[str, Any] = {"create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
        return leaves, list(torch.autograd.grad(value, leaves, **options))


def _two_differences(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree) -> tuple[Tree, Tensor]:
    """Central differences with steps h and h/2, extrapolated; and how far apart they were, relative to the product."""
    eps = tree.eps(params)
    size, length = tree.norm(params), tree.norm(v)
    # Relative to the parameters, between what truncation (h^4) and rounding (eps / h) would like.
    step = eps**0.25 * torch.where(size > 0, size, 1.0) / torch.where(length > 0, length, 1.0)

    def central(h: Tensor) -> Tree:
        plus, minus = (plain_gradient(loss, tree.add(params, v, c), args)[1] for c in (h, -h))
        return tree.unflatten([(p - m) / (2 * h).to(p.dtype) for p, m in zip(plus, minus, strict=True)], params)

    coarse, fine = central(step), central(step / 2)
    apart = tree.add(fine, coarse, -1.0)
    size = tree.norm(fine)
    return tree.add(fine, apart, 1 / 3), torch.where(size > 0, tree.norm(apart) / size, 0.0)


def _require_derivative(loss: Loss, params: Tree, args: tuple[Any, ...], v: Tree, product: Tree) -> None:
    """Plain autograd takes for constants what a ``once_differentiable`` backward computes, and says nothing."""
    if not _has_custom_backward(loss, params, args):
        return
    difference, apart = _two_differences(loss, params, args, v)
    gap, size = tree.norm(tree.add(product, difference, -1.0)), tree.norm(difference)
    if tree.known(gap > (0.01 + 10 * apart) * size):
        raise RuntimeError(
            f"second derivatives are not those of differences ({float(gap / size):.1g} of them apart): an "
            "autograd.Function whose backward has no derivative, such as a once_differentiable one?"
        )


def _has_custom_backward(loss: Loss, params: Tree, args: tuple[Any, ...]) -> bool:
    with torch.enable_grad():
        params = tree.map(lambda p: p.detach().requires_grad_(), params)
        waiting = [loss(params, *args).grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(inner for inner, _ in node.next_functions)
    return False


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
    v = gaussian(params, 1)[0]  # not of ones, which nets with norms are often blind to
    with turn(), sdpa_kernel(SDPBackend.MATH):
        return _first(loss, params, args, v, "auto")[1]


def product_of(loss: Loss, mode: str) -> Product:
    """The product in a mode, which finds its way at the first call for arguments of their shapes."""
    if mode != "auto" and mode not in WAYS:
        raise ValueError(f"mode={mode!r} must be 'auto' or one of {', '.join(map(repr, WAYS))}")
    found: dict[Any, Product] = {}
    said: set[str] = set()

    def product(params: Tree, args: tuple[Any, ...], v: Tree) -> Tree:
        if torch.compiler.is_compiling():
            with sdpa_kernel(SDPBackend.MATH):
                return WAYS["forward" if mode == "auto" else mode](loss)(params, args, v)
        shapes = (is_differentiated(params, args), *_shapes((params, args)))
        # The other attention kernels have neither forward rules nor double backward.
        with turn(), sdpa_kernel(SDPBackend.MATH):
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
    check_loss(loss, params, args)
    reasons: list[str] = []
    differentiated = is_differentiated(params, args)
    loss = by_definition(loss)
    for name in (("forward", "reverse") if differentiated else WAYS) if mode == "auto" else (mode,):
        try:
            product = WAYS[name](loss, params, args)
            with_error = name == "difference"
            result, apart = _two_differences(loss, params, args, v) if with_error else (product(params, args, v), 0.0)
            if name == "double_backward":
                _require_derivative(loss, params, args, v, result)
        except (RuntimeError, NotImplementedError) as error:
            if mode != "auto":
                raise
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        return product, Way(name, "; ".join(reasons), float(apart)), result
    raise RuntimeError("this loss cannot be differentiated twice in any way:\n" + "\n".join(reasons))


def is_differentiated(params: Tree, args: tuple[Any, ...]) -> bool:
    """Whether the product itself is to be differentiated: then some ways would cut its graph."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in stack):
        return True
    leaves = tree.leaves((params, args))
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in leaves)


def _announce(way: Way) -> str:
    exact = f"is not exact: its relative error is about {way.error:.1g}" if way.error else "is exact but may cost more"
    return f"Hessian-vector products in mode {way.mode!r}, which {exact}. Not possible were: {way.reason}"


def check_loss(loss: Loss, params: Tree, args: tuple[Any, ...]) -> Tensor:
    """The loss at these parameters, once it is found to be one finite real number, and no random one."""
    if tree.numel(params) == 0:
        raise ValueError("the parameters have no entries: there must be at least one to differentiate by")
    before = _random_states((params, args))
    with torch.no_grad():
        value = loss(params, *args)
    after = _random_states((params, args))
    if not all(torch.equal(state, after[device]) for device, state in before.items()):
        torch.set_rng_state(before.pop("cpu"))
        for device, state in before.items():
            getattr(torch, torch.device(device).type).set_rng_state(state, device)
        raise ValueError(
            "the loss draws random numbers, so it is not a function of its parameters: call model.eval(), or draw "
            "the numbers beforehand and pass them in the batch"
        )
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be one real number, not {found}: reduce it, for example by its mean")
    if tree.known(value.isfinite().all()) is False:
        raise ValueError(f"the loss is {value.item()} at these parameters: curvature needs a finite one")
    return value


def _random_states(arguments: Any) -> dict[str, Tensor]:
    """What a loss may draw from: the generators of the CPU and of the devices in use, by device."""
    states = {"cpu": torch.get_rng_state()}
    for device in {x.device for x in tree.leaves(arguments) if isinstance(x, Tensor)}:
        module: Any = getattr(torch, device.type, None)
        if hasattr(module, "get_rng_state"):
            states[str(device)] = module.get_rng_state(device)
    return states
