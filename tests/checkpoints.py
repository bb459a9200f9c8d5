"""What the tests of checkpoints share: a tree of every kind of array, and its placement."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from efficient.checkpoints.checkpoint import Checkpointer

P = PartitionSpec
ROOT = Path(__file__).parent.parent


def mesh_of(*shape, names=("data", "model")):
    count = int(np.prod(shape))
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), names[: len(shape)])


def tree(seed=0, layers=3):
    """Every kind of array, as NumPy: what was saved does not depend on JAX."""
    rng = np.random.default_rng(seed)

    def floats(*shape, dtype=np.float32):
        return rng.normal(size=shape).astype(dtype)

    stack = f"blocks/0-{layers - 1}"
    return {
        f"params/{stack}/mixer/q/kernel": floats(layers, 16, 64),
        f"params/{stack}/norm/scale": floats(layers, 16, dtype=jnp.bfloat16),
        "params/embed/table": floats(24, 64),
        f"optimizer/0/mu/{stack}/mixer/q/kernel": floats(layers, 16, 64),
        "optimizer/0/count": np.int32(rng.integers(1 << 30)),
        "state/rng": rng.integers(0, 1 << 32, (2,), dtype=np.uint32),
        "state/progress": np.float32(rng.normal()),
        "state/mask": rng.integers(0, 2, (8, 8)).astype(bool),
        "ema/codes": rng.integers(-128, 127, (8, 24)).astype(np.int8),
        "ema/small": floats(8, 8, dtype=jnp.float8_e4m3fn),
    }


def place(arrays, sharding=None):
    return {k: jax.device_put(v, sharding(k, v) if sharding else None) for k, v in arrays.items()}


def sharded(mesh, spec):
    """`spec` on the two last axes of the kernels, everything else replicated."""

    def rule(key, array):
        kernel = key.endswith(("kernel", "table", "codes"))
        full = P(*([None] * (np.ndim(array) - 2)), *spec) if kernel else P()
        return NamedSharding(mesh, full)

    return rule


def structs(arrays, sharding=None):
    return {
        k: jax.ShapeDtypeStruct(np.shape(v), v.dtype, sharding=sharding and sharding(k, v))
        for k, v in arrays.items()
    }


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        a, b = np.asarray(found[key]), np.asarray(value)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), key
        assert a.tobytes() == b.tobytes(), key


def save_three(directory):
    """Checkpoints 100, 200 and 300, each of another seed."""
    with Checkpointer(directory, keep=3) as checkpoints:
        for step in (100, 200, 300):
            checkpoints.save(step, place(tree(step)), {"phase": 1, "config": {"width": step}})
    return directory
