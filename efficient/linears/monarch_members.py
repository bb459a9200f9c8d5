"""Fast transforms that are Monarch matrices: Fourier, Hadamard, and through Fourier convolution.

Section 3 of "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", Dao et
al. 2022, arXiv 2204.00595, says that the class holds them; the factors are derived here. For
n = m^2 and m blocks of m x m the row-vector form of `efficient.linears.monarch` reads

    y[s m + l] = sum_k left[l, k, s] sum_p x[k m + p] right[k, p, l]

Fourier, with w_n = exp(-2 pi i / n). Read the input transposed, x[p m + k] for x[k m + p]; of the
exponent (s m + l)(p m + k) the term s p m^2 is a multiple of n, so

    w_n^((s m + l)(p m + k)) = w_m^(s k) w_n^(l k) w_m^(l p)
    right[k, p, l] = w_m^(l p) w_n^(l k)        left[l, k, s] = w_m^(s k)

Hadamard, H_n = H_m (x) H_m: right[k] = left[l] = H_m, with no permutation.

Convolution. circular(x, h) = F^-1 (F h . F x), and F^-1 has the conjugate factors over n: a product
of two Monarch matrices with the transposition before each.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from efficient.errors import UserError
from efficient.linears.monarch import monarch_multiply


def fourier(m: int) -> tuple[Complex[np.ndarray, "m m m"], Complex[np.ndarray, "m m m"]]:
    """(right, left) of the discrete Fourier transform of n = m^2 points after `transposed`."""
    at = np.arange(m)
    root = np.exp(-2j * np.pi * np.outer(at, at) / m)  # w_m^(l p), symmetric
    twiddle = np.exp(-2j * np.pi * np.outer(at, at) / m**2)  # w_n^(l k)
    return root * twiddle[:, None, :], np.broadcast_to(root, (m, m, m))


def hadamard(m: int) -> tuple[Float[np.ndarray, "m m m"], Float[np.ndarray, "m m m"]]:
    """(right, left) of the Hadamard matrix of order n = m^2, entries 1 and -1, Sylvester's order.

    Raises:
      UserError: m is no power of two.
    """
    if m < 1 or m & (m - 1):
        low = 1 << max(m, 1).bit_length() - 1
        best = min(low, 2 * low, key=lambda power: abs(power - m))
        raise UserError(
            f"hadamard: m={m} must be a power of two, the order is m * m; the nearest is {best}"
        )
    matrix = np.ones((1, 1))
    while matrix.shape[0] < m:
        matrix = np.kron([[1.0, 1.0], [1.0, -1.0]], matrix)
    factor = np.broadcast_to(matrix, (m, m, m))
    return factor, factor


def transposed(x: Array) -> Array:
    """x [..., m m] read as a matrix m x m and transposed; its own inverse."""
    m = _root(x.shape[-1])
    return x.reshape(*x.shape[:-1], m, m).swapaxes(-1, -2).reshape(x.shape)


def circular_convolution(x: Float[Array, "*B n"], h: Float[Array, " _"]) -> Float[Array, "*B n"]:
    """sum_t h[t] x[(f - t) mod n] for n = m^2, by four Monarch products of complex factors.

    Raises:
      UserError: n is no square, or h has another length.
    """
    n = x.shape[-1]
    if h.shape[-1] != n:
        raise UserError(
            f"circular_convolution: h has {h.shape[-1]} points, x {n}; cut h to {n} or pad it with"
            " zeros"
        )
    right, left = (jnp.asarray(f, jnp.complex64) for f in fourier(_root(n)))

    def transform(v, right, left):
        return monarch_multiply(transposed(v.astype(right.dtype)), right, left, n)

    spectrum = transform(x, right, left) * transform(h, right, left)
    return transform(spectrum, right.conj(), left.conj()).real / n


def _root(n: int) -> int:
    m = round(n**0.5)
    if m * m != n:
        raise UserError(f"{n} points are no square; the nearest that works is {m * m}")
    return m
