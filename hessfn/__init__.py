"""hessfn: functional Hessian analysis for PyTorch."""
