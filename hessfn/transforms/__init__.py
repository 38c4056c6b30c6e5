"""Transform: from a matvec to another one, or to what other libraries understand."""
