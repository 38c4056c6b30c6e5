"""Operations of our own, one node each in a graph, where torch's would keep a matrix that need not exist.

``tiles.py`` and ``chunks.py`` compute: attention without the matrix of all scores, cross-entropy without all logits.
``attention.py`` and ``cross_entropy.py`` say what these are to autograd, to a trace and to everybody else.
``outputs.py`` marks where the outputs of a model are, for Gauss-Newton products.
"""
