"""What a report keeps while it is not finished, in a folder of its own inside the one it will be written to."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from hessfn.core.errors import InvalidInput
from hessfn.storage import records
from hessfn.storage.product_journal import products_in

_NAME = ".unfinished"


@contextlib.contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """The folder for journals, ``out/.unfinished``, for one process at a time; gone once the report is written.

    It stays after whatever may not happen again, such as an interrupt or a full disk.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    kept = out / _NAME
    try:
        kept.mkdir(parents=True, exist_ok=True)
        held = records.lock(kept / "lock")
    except BlockingIOError:
        raise
    except OSError as error:
        raise InvalidInput(f"the report cannot be written to {str(out)!r}: {error.strerror}") from error
    with held:
        for scratch in out.glob(".report-*"):  # of one that was killed
            shutil.rmtree(scratch, ignore_errors=True)
        keep, before = False, num_products(out)
        try:
            yield kept
        except BaseException as error:
            wrong = isinstance(error, ValueError)  # and will be so again
            keep = before > 0 if wrong else num_products(out) > 0
            raise
        finally:
            if not keep:
                # At once, so that a kill leaves all of the products or none, and then in peace.
                gone = kept.rename(tempfile.mktemp(prefix=".report-", dir=out))
                shutil.rmtree(gone, ignore_errors=True)
                with contextlib.suppress(OSError):  # those with a report in them are not empty
                    for folder in made:
                        folder.rmdir()


def clear(kept: Path) -> None:
    """Drops the journals."""
    for folder in kept.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)


def num_products(out: Path) -> int:
    """How many products an unfinished report in ``out`` has made."""
    return sum(len(products_in(folder)) for folder in (out / _NAME).glob("*") if folder.is_dir())


def state_of(model: nn.Module, criterion: Callable[..., Any]) -> dict[str, Any]:
    """What products depend on besides the data, as far as it can be seen: the key of a journal."""
    wholes = [part for part in (model, criterion) if isinstance(part, nn.Module)]
    modules = [module for whole in wholes for module in whole.modules()]
    return {
        "parameters or buffers": [dict(whole.named_parameters()) | dict(whole.named_buffers()) for whole in wholes],
        "train or eval mode": [module.training for module in modules],
        "code": sorted({_source(code) for code in [criterion, *map(type, modules)]}),
    }


def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # it was typed in, or is no Python function
        return type(code).__qualname__
