"""Consume: from a matvec to eigenpairs, traces, diagonals and densities, each with its error."""
