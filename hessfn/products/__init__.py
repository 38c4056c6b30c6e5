"""Make: from a loss to a matvec. Which way a loss is differentiated twice, and what is asked of it before."""
