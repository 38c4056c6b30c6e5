"""Make: from a loss to a matvec. In which mode a loss is differentiated twice, and what is asked of it before."""
