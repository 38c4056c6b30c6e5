"""hessfn: functional Hessian analysis for PyTorch.

Make a matvec from a loss, transform it, consume it:

>>> import torch, hessfn as hf
>>> loss, params = hf.functionalize(torch.nn.Linear(3, 1), torch.nn.MSELoss())
>>> matvec = hf.hvp(loss, params, (torch.ones(4, 3), torch.zeros(4, 1)))
>>> estimate = hf.hutchinson(matvec, hf.rademacher(params, 10))
"""

from hessfn import plot, tree
from hessfn.curvature import fvp, ggnvp, hvp, linearized_hvp, mean_hvp
from hessfn.eigen import EigenPair, EigenPairs, Tridiagonal, eigsh, lanczos, power_iter
from hessfn.landscape import filter_normalized, gradient_direction, line, plane, random_direction
from hessfn.matvec import as_linear_operator, check_matvec, deflate, dense, progress, restrict
from hessfn.model import functionalize, stateless
from hessfn.probes import gaussian, rademacher
from hessfn.spectrum import Density, Quadrature, density, slq
from hessfn.trace import Estimate, hutchinson, hutchinson_diag, hutchinson_per_leaf
from hessfn.tree import MatVec, Tree
from hessfn.ways import Way, choose_way

__all__ = [
    "Density",
    "EigenPair",
    "EigenPairs",
    "Estimate",
    "MatVec",
    "Quadrature",
    "Tree",
    "Tridiagonal",
    "Way",
    "as_linear_operator",
    "check_matvec",
    "choose_way",
    "deflate",
    "dense",
    "density",
    "eigsh",
    "filter_normalized",
    "functionalize",
    "fvp",
    "gaussian",
    "ggnvp",
    "gradient_direction",
    "hutchinson",
    "hutchinson_diag",
    "hutchinson_per_leaf",
    "hvp",
    "lanczos",
    "line",
    "linearized_hvp",
    "mean_hvp",
    "plane",
    "plot",
    "power_iter",
    "progress",
    "rademacher",
    "random_direction",
    "restrict",
    "slq",
    "stateless",
    "tree",
]
