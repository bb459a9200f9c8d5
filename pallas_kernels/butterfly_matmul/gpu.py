"""`butterfly_matmul` on Hopper GPUs: factors of numbers as a Monarch matrix, by its kernels."""

from pallas_kernels.butterfly_matmul import as_monarch
from pallas_kernels.hopper import Machine
from pallas_kernels.monarch_matmul import gpu as monarch


def unsupported(x, twiddle, increasing, backward) -> str | None:
    """Why the kernels cannot do this; None where they can."""
    if (b := twiddle.shape[-1]) > 1:
        return f"factors of blocks of {b} features"
    width = _width(x)
    return as_monarch.unsupported(monarch, x, twiddle, increasing, width, backward)


def forward(x, twiddle, increasing, precision, machine=Machine()):
    """y [M, N] of x [M, N]."""
    how = increasing, precision, _width(x)
    return as_monarch.forward(monarch, x, twiddle, *how, machine=machine)


def backward(x, twiddle, dy, increasing, precision, machine=Machine()):
    """dx in x's dtype and the gradient of twiddle."""
    how = increasing, precision, _width(x)
    return as_monarch.backward(monarch, x, twiddle, dy, *how, machine=machine)


def _width(x) -> int:
    """Of the blocks: eight features or more of one go to the same block of the other factor."""
    return next((w for w in (128, 256) if w * w >= 8 * x.shape[-1]), 512)
