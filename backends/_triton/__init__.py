"""Kernels in Triton, for the backends of GPUs: a library, not a device.

formats.py    FP8 numbers in integer arithmetic, inside kernels
launch.py     one launch: a kernel with its grid, arguments and constants, to be run or compiled ahead of time
ahead.py      compiling for a device that is not here
warmup.py     what a model launches, compiled before
targets.py    what an architecture has units for
tiles.py      what a product's tiles cost; order.py: in which order programs take them
tuned.py      tiles that were measured, on disk; tuning.py: how they are
product.py    one tile of a product; gating.py: what lies between an expert's projections
weights.py    where the weights of groups lie; workspace.py: memory for what lies between launches
casts.py, gemm.py, grouped.py, gate.py, permute.py, experts.py    kernels, and how a prepared call becomes launches
kernels.py    the list of them that backends register
"""
