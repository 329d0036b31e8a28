"""Runs PTX for sm_90a on the CPU, and says what is wrong with it.

    from moekern.backends.cuda.emulator import Module

    Module(ptx).launch("kernel", grid=4, block=128, arguments=[x, y, 1.5])

docs/emulator.md says what is emulated and what is not. The library behind it also has the CUDA driver's functions, so
that a launcher written for libcuda runs on it. It is opened at the first use.
"""

from __future__ import annotations

from moekern.backends.cuda.emulator.driver import Fault, library_path
from moekern.backends.cuda.emulator.module import Kernel, Module, Parameter, Statistics
from moekern.backends.cuda.emulator.tensor_maps import TensorMap

__all__ = ["Fault", "Kernel", "Module", "Parameter", "Statistics", "TensorMap", "library_path"]
