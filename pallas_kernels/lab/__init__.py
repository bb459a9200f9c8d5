"""The laboratory: what the TPU and GPU compilers make of a kernel, on a machine that has neither.

`python -m pallas_kernels.lab` prints the report; `compile_tpu` gives it to a program.
"""

from pallas_kernels.lab.case import Case, Program
from pallas_kernels.lab.tpu import compile_tpu

__all__ = ["Case", "Program", "compile_tpu"]
