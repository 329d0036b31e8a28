"""Time of a kernel on a device from first principles: what is multiplied, moved and waited for.

`gemm` has the products, `passes` what only moves bytes, `exchange` expert parallelism, `layers` puts them together to a
Mixture-of-Experts layer and to a model, `cpu` is the same for the kernels of this machine, `fit` finds the constants
from published rows and holds others back to check them.
"""
