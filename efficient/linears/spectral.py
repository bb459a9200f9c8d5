"""Factors of a random matrix without its decomposition: orthonormal bases and singular values.

Of a matrix with independent Gaussian entries, W = U diag(s) V^T, the three parts are independent,
U and V uniform (Haar) over orthonormal bases. So each can be drawn alone, by a key of its own. The
singular values of large matrices hardly vary from draw to draw; here they are the quantiles of the
law that they tend to (Marchenko and Pastur 1967), the same in every layer of a shape.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@functools.cache
def gaussian_singular_values(rows: int, columns: int) -> Float[np.ndarray, " m"]:
    """Singular values of a rows x columns matrix of standard normal entries, in descending order.

    m = min(rows, columns) quantiles. With c = m / n, n the longer side, s^2 / n has the density
    sqrt((b - x) (x - a)) / (2 pi c x) from a = (1 - sqrt c)^2 to b = (1 + sqrt c)^2, which
    x = 1 + c + 2 sqrt(c) cos(t) makes smooth: 2 sin(t)^2 / (pi x) over t from 0 to pi.
    """
    short, long = sorted((rows, columns))
    c, count = short / long, 65536
    t = (np.arange(count) + 0.5) * np.pi / count
    x = 1 + c + 2 * np.sqrt(c) * np.cos(t)
    above = np.cumsum(2 * np.sin(t) ** 2 / (np.pi * x)) * np.pi / count
    wanted = (np.arange(short) + 0.5) / short
    return np.sqrt(long * np.interp(wanted, above, x))


@jax.custom_batching.sequential_vmap
def _haar(normal: Float[Array, "n r"]) -> Float[Array, "n r"]:
    """The basis that Gram and Schmidt make of the columns; one matrix at a time."""
    q, r = jnp.linalg.qr(normal)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)


def orthonormal(key: Array, rows: int, columns: int) -> Float[Array, "n r"]:
    """Orthonormal columns, uniform over all such; columns <= rows. float32."""
    return _haar(jax.random.normal(key, (rows, columns)))


@dataclasses.dataclass(frozen=True)
class Orthonormal:
    """Orthonormal columns [n, r]."""

    def __call__(self, key: Array, shape: tuple[int, int], dtype) -> Array:
        return orthonormal(key, *shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class SingularValues:
    """All singular values of a Gaussian matrix of this shape and standard deviation."""

    rows: int
    columns: int
    std: float

    def __call__(self, key: Array, shape: tuple[int], dtype) -> Array:
        del key, shape
        return jnp.asarray(self.std * gaussian_singular_values(self.rows, self.columns), dtype)


@dataclasses.dataclass(frozen=True)
class SpectralFactor:
    """U_r diag(s_r)^(1/2) [rows, r] or, on the `right`, diag(s_r)^(1/2) V_r^T [r, columns].

    The r leading parts of a Gaussian matrix. With `ones` each of its r singular values becomes 1.
    """

    rows: int
    columns: int
    std: float
    right: bool = False
    ones: bool = False

    def __call__(self, key: Array, shape: tuple[int, int], dtype) -> Array:
        rank = shape[0] if self.right else shape[1]
        values = self.std * gaussian_singular_values(self.rows, self.columns)[:rank]
        root = np.ones(rank) if self.ones else np.sqrt(values)
        factor = orthonormal(key, self.columns if self.right else self.rows, rank) * root
        return (factor.T if self.right else factor).astype(dtype)
