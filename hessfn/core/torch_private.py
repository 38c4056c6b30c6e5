"""The one file that imports what torch keeps private: each name, what it is for, and what there is without it.

Seen on torch 2.9 to 2.14. Where torch has a public way, it is taken elsewhere, under its own name. A version that lacks
one of these names fails here, at ``import hessfn``, and not in the middle of a product.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.autograd.forward_ad as _forward_ad

# Trees. Without: optree, which torch itself is moving to, with the same functions.
from torch.utils import _pytree as pytree

# What sees every operation below autograd, as the recorder must. Without: nothing public goes below autograd.
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

with warnings.catch_warnings():
    # torch imports this at the first forward-mode derivative, and then warns of its own use of torch.jit. Without:
    # that warning, in the user's first product.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)  # on torch 2.11 to 2.13 it is one of these
    import torch._decomp.decompositions_for_jvp

# The transforms of torch.func that are under way. Without: a graph made under vmap would hold one batch's values.
from torch._C._functorch import TransformType as _TransformType
from torch._C._functorch import get_interpreter_stack as _get_interpreter_stack
from torch._C._functorch import get_unwrapped as _get_unwrapped
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._C._functorch import peek_interpreter_stack as _peek_interpreter_stack

# Operations that lack a derivative rule, in terms of those that have one. Without: our own definition of each.
from torch._decomp import get_decompositions

# Where the sources of graphs are kept, so that a debugger finds them.
from torch.fx.graph_module import _loader

from hessfn.core.locks import Lock

OpOverload = type(torch.ops.aten.add.Tensor)  # one operation on tensors of one kind of arguments; no private name

# What weight normalisation calls, so that its definition can stand in for it. Without: its wrong second derivative.
weight_norm: Callable[..., torch.Tensor] = torch._weight_norm

# What packed sequences come back by, reading their lengths. Without: a trace would not know that it did.
pad_packed_sequence: Callable[..., Any] = torch._C._VariableFunctions._pad_packed_sequence

# What distributions ask of their arguments. Without: a trace would take that for a branch on values.
is_all_true: Callable[..., torch.Tensor] = torch._is_all_true

# What all norms that keep statistics of the batch, and all kinds of dropout, are. Without: a list of them by name.
BatchStatistics: type[Any] = torch.nn.modules.batchnorm._NormBase
Dropout: type[Any] = torch.nn.modules.dropout._DropoutNd


def under_functorch() -> bool:
    """Whether a transform of ``torch.func`` (vmap, grad, jvp, functionalize) is under way."""
    return _peek_interpreter_stack() is not None


def under_derivative() -> bool:
    """Whether one of those transforms takes a derivative."""
    stack = _get_interpreter_stack() or ()
    return any(level.key() in (_TransformType.Grad, _TransformType.Jvp) for level in stack)


def num_derivatives() -> int:
    """How many derivatives are being taken around this, by transforms and in forward mode; backward does not tell."""
    kinds = [level.key() for level in _get_interpreter_stack() or ()]
    transforms = sum(key in (_TransformType.Grad, _TransformType.Jvp) for key in kinds)
    return transforms + (under_dual_level() and _TransformType.Jvp not in kinds)


def num_transforms() -> int:
    """How many transforms of ``torch.func`` are under way, one in another."""
    return len(_get_interpreter_stack() or ())


def under_vmap_within_derivative() -> bool:
    """Whether a ``vmap`` is under way within what is differentiated: by a transform around it, or else by backward."""
    kinds = [level.key() for level in _get_interpreter_stack() or ()]
    derivatives = [i for i, kind in enumerate(kinds) if kind in (_TransformType.Grad, _TransformType.Jvp)]
    return _TransformType.Vmap in kinds[derivatives[-1] + 1 if derivatives else 0 :]


def under_forward_derivative() -> bool:
    """Whether one of those transforms takes a derivative in forward mode."""
    return any(level.key() == _TransformType.Jvp for level in _get_interpreter_stack() or ())


def under_dual_level() -> bool:
    """Whether derivatives in forward mode are taken, with a transform or by plain autograd."""
    return _forward_ad._current_level >= 0


def levels(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as each transform of ``torch.func`` sees it, from within. Without: vmap hides what is differentiated."""
    while is_functorch_wrapped_tensor(x):
        yield x
        x = _get_unwrapped(x)
    yield x


def current_dispatch_mode() -> Any:
    """What sees operations now, as a trace does, or None. Without: traces would miss our compiled operations."""
    return _get_current_dispatch_mode()


def is_composite(func: Any) -> bool:
    """Whether an operation is made of others, which are what is to be recorded. Without: fewer rules would match."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def python_meta_kernel(func: Any) -> Callable[..., Any] | None:
    """What torch computes shapes with, where it is Python. Without: the operation on meta, which is slow to import."""
    return func.py_kernels.get(torch._C.DispatchKey.Meta)


def arguments_of(func: Any) -> list[tuple[str, str]]:
    """Names and types of what an operation takes. ``_schema`` is the only place where they stand."""
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments]


def is_mutable(func: Any) -> bool:
    """Whether an operation writes into an argument."""
    return func._schema.is_mutable


def is_view(func: Any) -> bool:
    """Whether the result of an operation may be another name for its input's memory."""
    returns = func._schema.returns if isinstance(func, OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def without_onednn() -> contextlib.AbstractContextManager[None]:
    """oneDNN's kernels off. ``torch.backends.mkldnn.flags`` also sets what warns where there is no Intel GPU."""
    return _off(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled)


def without_cudnn() -> contextlib.AbstractContextManager[None]:
    """cuDNN's kernels off. ``torch.backends.cudnn.flags`` also asks for TF32, by names that torch 2.9 warns of."""
    return _off(torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled)


@contextlib.contextmanager
def _off(is_on: Callable[[], bool], switch: Callable[[bool], None]) -> Iterator[None]:
    before = is_on()
    switch(False)
    try:
        yield
    finally:
        switch(before)


def uncompiled_part(x: Any) -> Any:
    """The module or function that ``torch.compile`` made x from, or None. Without: its names, and its compiler."""
    if isinstance(x, types.FunctionType):  # a wrapper around it has its attributes, and another id
        own = vars(x).get("_torchdynamo_wrapper_id") == id(x)
        return vars(x).get("_torchdynamo_orig_callable") if own else None
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return x._orig_mod if compiler is not None and isinstance(x, compiler.OptimizedModule) else None


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """What ``torch.compile`` made runs as it was written, in this thread. Without: its public switch is of all threads.

    Nothing was compiled where the compiler, slow to import, is not there.
    """
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    in_this_thread = getattr(compiler, "_use_eager_on_nested_compile", None)  # since torch 2.14
    return in_this_thread() if in_this_thread is not None else _UncompiledInAllThreads()


class _UncompiledInAllThreads:
    """The first thread that enters switches the compiler off, the last that leaves puts back what was there before.

    The class keeps them: a loss that looks up a global which changes seems to change, and is traced anew.
    """

    lock: ClassVar[Lock] = Lock()
    stances: ClassVar[list[Any]] = []

    def __enter__(self) -> None:
        with self.lock:
            self.stances.append(None if self.stances else torch.compiler.set_stance("force_eager"))

    def __exit__(self, *_: object) -> None:
        with self.lock:
            stance = self.stances.pop()
            if stance is not None:
                stance.__exit__(None, None, None)


def set_scripted(module: torch.jit.ScriptModule, name: str, value: torch.Tensor) -> None:
    """Another tensor in place of a scripted module's, which need not be a leaf. Without: a script has no parameters."""
    *path, last = name.split(".")
    functools.reduce(lambda part, step: part.getattr(step), path, module._c).setattr(last, value)


def forget_source(module: torch.fx.GraphModule) -> None:
    """Takes a graph's source out of the caches of the process. Without: what make_fx has made stays there for ever."""
    key = type(module).forward.__code__.co_filename
    _loader.eval_cache.pop(key, None)
    linecache.cache.pop(key, None)


def decompositions(operations: Iterable[Any]) -> dict[Any, Callable[..., Any]]:
    """Those of the operations that torch can decompose, by what they decompose to."""
    return dict(get_decompositions(list(operations)))


__all__ = [
    "BatchStatistics",
    "Dropout",
    "OpOverload",
    "TorchDispatchMode",
    "current_dispatch_mode",
    "decompositions",
    "forget_source",
    "is_all_true",
    "is_composite",
    "is_functorch_wrapped_tensor",
    "is_mutable",
    "is_view",
    "levels",
    "num_derivatives",
    "num_transforms",
    "pad_packed_sequence",
    "python_meta_kernel",
    "pytree",
    "set_scripted",
    "uncompiled",
    "uncompiled_part",
    "under_derivative",
    "under_dual_level",
    "under_forward_derivative",
    "under_functorch",
    "under_vmap_within_derivative",
    "weight_norm",
    "without_cudnn",
    "without_onednn",
]
