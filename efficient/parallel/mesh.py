"""The mesh: all axes that a config may name, over the devices there are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from efficient.errors import UserError, nearest

# The slowest-varying axis first: neighbours on the interconnect serve the axes that talk most.
AXES = ("pipeline", "data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | np.ndarray | None = None) -> Mesh:
    """A mesh of all `AXES`, in that order; one axis may be -1 and takes what is left.

    Args:
      sizes: axis -> number of devices.
      devices: taken in their order; by default all of `jax.devices()`, ordered by the interconnect.
    """
    for axis in sizes:
        if axis not in AXES:
            raise UserError(f"config.mesh has no axis {axis!r}; {nearest(axis, AXES)}")
    given = devices is not None
    devices = np.asarray(devices if given else jax.devices())
    shape = [sizes.get(axis, 1) for axis in AXES]
    free = [i for i, n in enumerate(shape) if n == -1]
    if len(free) > 1 or any(n == 0 or n < -1 for n in shape):
        wrong = {a: n for a, n in sizes.items() if n != 1}
        raise UserError(f"config.mesh {wrong}: sizes are positive, and at most one is -1")
    taken = math.prod(n for n in shape if n != -1)
    if free:
        if devices.size % taken:
            wrong = ", ".join(f"{a}={n}" for a, n in sizes.items() if n not in (1, -1))
            raise UserError(f"config.mesh {wrong} does not divide {devices.size} devices")
        shape[free[0]] = devices.size // taken
    elif taken != devices.size:
        wrong = ", ".join(f"{a}={n}" for a, n in sizes.items() if n != 1) or "all 1"
        raise UserError(
            f"config.mesh ({wrong}) takes {taken} of {devices.size} devices; set one axis to -1"
        )
    if given or devices.flat[0].platform == "cpu":  # those of a plan are laid out as the torus is
        return Mesh(devices.reshape(shape), AXES)
    return Mesh(mesh_utils.create_device_mesh(shape, devices.ravel()), AXES)
