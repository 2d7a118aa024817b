"""Tensors in, tensors out: the floor that knows torch and nothing above it.

Letters, in every docstring of the package:

    N  tokens that carry a label        C  classes: items, or words of the vocabulary
    D  width of a hidden state          K  classes asked for (top-k) or drawn (negatives)
    R  rounds                           G  groups; a group of n tokens meets m classes

How a loss over C classes is computed without its (N, C) logits:

    plan     which (token, class) pairs are scored, and with which log-weight    plans/*.py
    stream   walk the plan tile by tile: score, reduce, forget                   stream.py
    merge    fold each tile into its tokens' running value                       stream_torch.py,
             or the same on a GPU, in kernels that keep a tile on the chip       stream_triton.py
             or on a CPU, for narrow float32 rows, in C++ (kernels.cpp)          stream_native.py,
             then of processes, each of which scored its own classes             vocab_parallel.py

A plan is a handful of grids (plan.py). A grid is G groups of (n tokens) x (m classes), so a tile is
one batched matrix product. Merging is associative: tiles, rounds and processes are all folded the
same way.
"""
