"""Attention of long sequences on the CPU in compiled code, with both derivatives: a guest of the engine.

What ``fused/tiles.py`` does in operations of torch, ``kernel.c`` does as machine code, in float32. hessfn works without
this folder, only more slowly: nothing but ``engine/pipeline.py`` imports it.
"""
