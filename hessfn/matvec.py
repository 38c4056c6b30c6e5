"""From one matvec to another, and to what other libraries understand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessfn import tree
from hessfn.probes import gaussian
from hessfn.sharded import whole
from hessfn.tree import MatVec, Tree

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def restrict(matvec: MatVec, like: Tree, names: str | Iterable[str]) -> MatVec:
    """The diagonal block of a matrix that belongs to some of the leaves: zero-pad in, select out.

    Args:
        matvec: products with the whole matrix, on trees like ``like``.
        names: glob patterns of dotted leaf names, as in ``"layer1.*"``.

    Returns:
        A matvec on dicts from leaf name to tensor, those of ``tree.select(like, names)``, at one product of the whole.

    Raises:
        ValueError: a pattern matches no leaf.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> whole = lambda v: dict(zip("ab", A @ torch.stack([v["a"], v["b"]])))
    >>> restrict(whole, {"a": torch.zeros(()), "b": torch.zeros(())}, "b")({"b": torch.tensor(1.0)})
    {'b': tensor(3.)}
    """
    return block(matvec, like, names, names)


def block(matvec: MatVec, like: Tree, rows: str | Iterable[str], columns: str | Iterable[str]) -> MatVec:
    """Any block of a matrix, such as that between two layers: zero-pad in by columns, select out by rows.

    Args:
        matvec: products with the whole matrix, on trees like ``like``.
        rows, columns: glob patterns of dotted leaf names.

    Returns:
        A function from dicts like ``tree.select(like, columns)`` to dicts like ``tree.select(like, rows)``, at one
        product of the whole. For a symmetric matrix the block with both exchanged is its transpose.

    Raises:
        ValueError: a pattern matches no leaf.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> whole = lambda v: dict(zip("ab", A @ torch.stack([v["a"], v["b"]])))
    >>> block(whole, {"a": torch.zeros(()), "b": torch.zeros(())}, "a", "b")({"b": torch.tensor(1.0)})
    {'a': tensor(1.)}
    """
    entering, leaving = tree.select(like, columns), tree.select(like, rows)
    known = tree.names(like)

    def product(v: Tree) -> Tree:
        v = tree.aligned(v, entering)
        blank = zip(known, tree.leaves(like), strict=True)
        padded = [v[name] if name in entering else torch.zeros_like(x) for name, x in blank]
        whole = dict(zip(known, tree.leaves(matvec(tree.unflatten(padded, like))), strict=True))
        return {name: whole[name] for name in leaving}

    return product


def deflate(matvec: MatVec, vectors: Tree) -> MatVec:
    """``(I - QQ') A (I - QQ')``: the matrix with the span of some vectors taken out.

    Args:
        vectors: a tree whose leaves carry a leading axis of k vectors, as ``eigsh(...).vectors``. They need not be
            orthonormal; a QR factorisation makes them so, once.

    >>> A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> deflate(lambda v: A @ v, torch.eye(3)[:1])(torch.ones(3))
    tensor([0., 2., 1.])
    """
    rows = torch.func.vmap(lambda v: tree.ravel(v)[0])(tree.map(whole, vectors))
    basis = torch.linalg.qr(rows.T.to(torch.promote_types(rows.dtype, torch.float32))).Q

    def outside(v: Tree) -> Tree:
        flat, unravel = tree.ravel(v)
        flat = flat.to(basis.dtype)
        return unravel(flat - basis @ (basis.T @ flat))

    return lambda v: outside(matvec(outside(v)))


def progress(
    matvec: Callable[..., Any], total: int | None = None, desc: str = "", *, unit: str = "product"
) -> Callable[..., Any]:
    """The same products, counted by a progress bar, with the time left where ``total`` is known.

    Any other function will do, such as the loss of a landscape, with ``unit="point"``: what is counted are its calls. A
    group under ``vmap`` is one call.
    """
    from tqdm.auto import tqdm

    bar = tqdm(total=total, desc=desc, unit=unit)

    def counted(*args: Any) -> Any:
        result = matvec(*args)
        bar.update()
        if bar.n == total:
            bar.close()
        return result

    return counted


def dense(matvec: MatVec, like: Tree) -> Tensor:
    """The whole matrix ``(n, n)``, column by column: n matvecs and n^2 numbers, for small n.

    >>> dense(lambda v: 2 * v, torch.zeros(2))
    tensor([[2., 0.],
            [0., 2.]])
    """
    flat, unravel = tree.ravel(like)
    columns = [
        tree.ravel(matvec(unravel(unit)))[0] for unit in torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    ]
    return torch.stack(columns, dim=1)


def as_linear_operator(matvec: MatVec, like: Tree) -> LinearOperator:
    """The matrix as SciPy knows it, for ``scipy.sparse.linalg``: flat NumPy vectors, in the entries' order of ``like``.

    >>> import numpy, scipy.sparse.linalg
    >>> operator = as_linear_operator(lambda v: 2 * v, torch.zeros(3, dtype=torch.float64))
    >>> scipy.sparse.linalg.cg(operator, numpy.ones(3))[0]
    array([0.5, 0.5, 0.5])
    """
    from scipy.sparse.linalg import LinearOperator

    flat, unravel = tree.ravel(like)
    kind = torch.empty((), dtype=flat.dtype).numpy().dtype

    def product(v: Any) -> Any:
        vector = torch.as_tensor(v.reshape(-1), dtype=flat.dtype, device=flat.device)
        return tree.ravel(matvec(unravel(vector)))[0].detach().cpu().numpy()

    return LinearOperator((len(flat), len(flat)), matvec=product, rmatvec=product, dtype=kind)


def check_matvec(matvec: MatVec, like: Tree, *, seed: int = 0, rtol: float | None = None) -> None:
    """Asks a matvec whether it is one: the same for the same vector, linear, symmetric. Four products.

    Args:
        rtol: how much relative error is rounding; by default the cube root of the dtype's resolution, since products
            of a net that fits its data well lose digits to cancellation.

    Raises:
        ValueError: it is not, with the size of the error and what usually causes it.

    >>> check_matvec(lambda v: 2 * v, torch.zeros(3))
    >>> check_matvec(lambda v: v.abs(), torch.zeros(3))
    Traceback (most recent call last):
    ValueError: the matvec is not linear: ...
    """
    x, y = gaussian(like, 2, seed=seed)
    if rtol is None:
        rtol = tree.eps(like) ** (1 / 3)
    ax, again, ay = tree.aligned(matvec(x), like, "the product"), matvec(x), matvec(y)
    for product in (ax, ay):
        tree.require_finite(product, "the product of the matvec")
    size = tree.norm(ax) + tree.norm(ay)

    def require(error: Tensor, scale: Tensor, what: str, cause: str) -> None:
        if error > rtol * scale:
            raise ValueError(
                f"the matvec is not {what}: relative error {float(error / scale):.1e} > rtol={rtol:.1e}. {cause}"
            )

    require(
        tree.norm(tree.add(ax, again, -1.0)),
        size,
        "deterministic",
        "Two products of one vector differ: look for dropout in training mode (call model.eval()), a loader that "
        "shuffles or augments at random (use list(loader)), or an operation that is random on this device.",
    )
    combination = tree.add(matvec(tree.add(x, y, -2.0)), tree.add(ax, ay, -2.0), -1.0)
    require(tree.norm(combination), size, "linear", "A(x - 2y) differs from Ax - 2Ay: this is no matrix.")
    require(
        (tree.dot(x, ay) - tree.dot(y, ax)).abs(),
        (tree.norm(x) * tree.norm(ay) + tree.norm(y) * tree.norm(ax)) / tree.numel(like) ** 0.5,
        "symmetric",
        "x'Ay differs from y'Ax: look for a torch.no_grad() block or .detach() inside the model, for a custom backward "
        "that is not the derivative of its forward, or for a matrix that is not a Hessian.",
    )
