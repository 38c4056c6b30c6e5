"""Along a training: what the curvature is in the present state of an optimiser, and how it changes."""
