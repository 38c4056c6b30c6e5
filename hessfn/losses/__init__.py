"""From a model and its data to a loss: a pure function of parameters, or of what flows through layers."""
