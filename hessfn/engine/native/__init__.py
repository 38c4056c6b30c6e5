"""Functions in C: compiled once on a machine, kept in the user's cache, absent where there is no compiler.

The guests of the engine (``conv3x3/``, ``flash_attention/``) each have one source.
"""
