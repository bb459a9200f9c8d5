"""Kernels for TPU and GPU in Pallas, one folder an op, and the laboratory that proves them."""
