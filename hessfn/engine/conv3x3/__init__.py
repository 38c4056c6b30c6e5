"""Convolutions by 3 x 3 on the CPU with a quarter of the multiplications: a guest of the engine.

``kernel.c`` does them as machine code; ``winograd.py`` does them in operations of torch where there is no compiler, or
where ``HESSFN_NATIVE=0`` switches the kernel off. hessfn works without this folder, only more slowly: nothing but
``engine/pipeline.py`` imports it.
"""
