"""What hessfn and its peers can do: a yes is a call that ran here and was right, held against dense matrices.

``python tests/bench/bench_features.py``: a row for each feature, and why the answer is no where it is. A peer that is
not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import feature_probes as ask
import record

LIBRARIES = {"hessfn": "hessfn", **{name: name.lower().replace("-", "_") for name in record.PEERS}}
ALL = tuple(LIBRARIES)
FEATURES: dict[str, tuple[Callable[..., None], tuple[str, ...], tuple[Any, ...]]] = {
    "Hessian of a data set whose last batch is smaller": (ask.matrix, ALL, ()),
    "Hessian of a net with LayerNorm": (ask.matrix, ALL, ("norm", (40,))),
    "Hessian with torch's default attention kernel": (ask.matrix, ALL, ("attention", (40,))),
    "Gauss-Newton and Fisher matrices": (ask.gauss_newton, ("hessfn", "curvlinops", "hessian-eigenthings"), ()),
    "KFAC, EKFAC, their inverses; Jacobians": (ask.kronecker, ("curvlinops",), ()),
    "eigenpairs with their residuals": (ask.eigenpairs, ("hessfn", "hessian-eigenthings"), ()),
    "traces with their standard errors": (ask.trace, ("hessfn", "hessian-eigenthings"), ()),
    "spectral density": (ask.density, ALL, ()),
    "linear systems": (ask.solution, ("hessfn", "curvlinops"), ()),
    "curvature by activations": (ask.activations, ("hessfn", "curvlinops"), ()),
    "under `vmap` and `grad`": (ask.composes, ("hessfn",), ()),
    "many processes": (ask.many_processes, ("hessfn", "hessian-eigenthings"), ()),
    "leaves model and random state alone": (ask.leaves_no_trace, ALL, ()),
    "a report on one page, resumed after a kill": (ask.report, ("hessfn",), ()),
}


PARTLY = {
    ("eigenpairs with their residuals", "PyHessian"): "has eigenvalues, without",
    ("eigenpairs with their residuals", "curvlinops"): "leaves eigenpairs to SciPy",
    ("traces with their standard errors", "PyHessian"): "returns the samples",
    ("traces with their standard errors", "curvlinops"): "has traces, without",
}


def answer(feature: str, library: str) -> str | None:
    """None for a yes, else why not."""
    probe, libraries, given = FEATURES[feature]
    if library not in libraries:
        return PARTLY.get((feature, library), "has nothing for it")
    try:
        probe(library, *given)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error) or 'wrong').splitlines()[0][:100]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="*", help="parts of their names (default: all)")
    record.add_option(parser)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers' deprecations
    here = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module)]
    rows = []
    for feature in FEATURES:
        if given.features and not any(part in feature for part in given.features):
            continue
        for library in here:
            why = answer(feature, library)
            rows.append({"feature": feature, "by": library, "has": why is None, **({"why": why} if why else {})})
            print(f"{feature:50} {library:20} {'no: ' + why if why else 'yes'}", flush=True)
    record.write(given.json, rows)
    if any(row["by"] == "hessfn" and not row["has"] and "nothing" not in row["why"] for row in rows):
        sys.exit("hessfn has a feature that does not run")


if __name__ == "__main__":
    main()
