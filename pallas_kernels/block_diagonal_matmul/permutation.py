"""Static permutations of features: hashable, equal by value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Stride:
    """Reads F features as [F / count, count] and transposes.

    Feature i * count + l goes to place l * (F / count) + i; Stride(F / count) brings it back.
    """

    count: int

    def misfit(self, features: int) -> str | None:
        """Why it is no permutation of so many features; None where it is."""
        if isinstance(self.count, int) and self.count > 0 and features % self.count == 0:
            return None
        return f"a count that divides {features} features"

    def order(self, features: int) -> np.ndarray:
        """The permuted vector is v[order]."""
        return np.arange(features).reshape(-1, self.count).T.reshape(-1)

    def permute(self, x: jax.Array) -> jax.Array:
        """x [..., F], permuted along its last axis."""
        return x.reshape(*x.shape[:-1], -1, self.count).swapaxes(-1, -2).reshape(x.shape)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `permute`."""
        return x.reshape(*x.shape[:-1], self.count, -1).swapaxes(-1, -2).reshape(x.shape)


@dataclasses.dataclass(frozen=True, init=False)
class Permutation:
    """Any permutation, by its order: the permuted vector is v[order].

    Args:
      order: the integers below F, each once; NumPy or a list.

    Raises:
      ValueError: they are not.
    """

    packed: bytes

    def __init__(self, order):
        order = np.asarray(order)
        if (
            order.ndim != 1
            or order.dtype.kind not in "iu"
            or not np.array_equal(np.sort(order), np.arange(order.size))
            or not order.size
        ):
            raise ValueError(
                "Permutation: order must be the integers below its length, each once; got "
                f"{order.dtype} {list(order.shape)}"
            )
        object.__setattr__(self, "packed", order.astype(np.int32).tobytes())

    def __repr__(self):
        return f"Permutation({np.frombuffer(self.packed, np.int32).tolist()})"

    def misfit(self, features: int) -> str | None:
        """Why it is no permutation of so many features; None where it is."""
        return None if len(self.packed) == 4 * features else f"an order of {features} features"

    def order(self, features: int) -> np.ndarray:
        """The permuted vector is v[order]."""
        del features
        return np.frombuffer(self.packed, np.int32)

    def permute(self, x: jax.Array) -> jax.Array:
        """x [..., F], permuted along its last axis."""
        return jnp.take(x, self.order(x.shape[-1]), axis=-1, unique_indices=True)

    def restore(self, x: jax.Array) -> jax.Array:
        """The inverse of `permute`."""
        return jnp.take(x, np.argsort(self.order(x.shape[-1])), axis=-1, unique_indices=True)


class Inverse:
    """A permutation the other way."""

    def __init__(self, permutation: Stride | Permutation):
        self.permute, self.restore = permutation.restore, permutation.permute


def permuted(x: jax.Array, permutation: Stride | Permutation | Inverse | None) -> jax.Array:
    """x [..., F] permuted along its last axis; x itself where there is no permutation."""
    return x if permutation is None else permutation.permute(x)
