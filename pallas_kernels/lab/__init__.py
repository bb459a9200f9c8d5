"""The laboratory: what the TPU and GPU compilers make of a kernel, on a machine that has neither.

`python -m pallas_kernels.lab` prints the report; `compile_tpu` gives it to a program, and `traffic`
counts the bytes that a kernel's windows move.
"""

from pallas_kernels.lab.case import Case, Program
from pallas_kernels.lab.tpu import compile_tpu
from pallas_kernels.lab.traffic import Traffic, traffic

__all__ = ["Case", "Program", "Traffic", "compile_tpu", "traffic"]
