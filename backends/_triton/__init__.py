"""Kernels in Triton, for the backends of GPUs: a library, not a device.

formats.py    FP8 numbers in integer arithmetic, inside kernels
launch.py     one launch: a kernel with its grid, arguments and constants, to be run or compiled ahead of time
ahead.py      compiling for a device that is not here
warmup.py     what a model launches, compiled before
targets.py    what an architecture has units for
casts.py, gemm.py    kernels, and how a prepared call of an op becomes a launch
"""
