"""The ground floor: trees, probes, results, errors, and what torch is asked for. It imports nothing of hessfn."""
