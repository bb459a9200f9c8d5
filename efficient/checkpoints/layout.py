"""Layers in memory and layers on disk.

In memory alike neighbouring layers are stacked: `blocks/0-11/mixer/q/kernel` is one [12, ...]
array. Checkpoints, rules and surgery name single layers: `blocks/0/...` to `blocks/11/...`. The
functions here go from one to the other under a mesh, and give every layer a checksum that is the
same in both forms and under any sharding.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, UInt32

from efficient.errors import UserError
from efficient.model import RANGE, layers_of

# Bytes on one device that a single program reads: bounds the second copy that (un)stacking makes.
GROUP_BYTES = 1 << 30


def is_stacked(key: str) -> bool:
    """Whether `key` names a range of layers, as `blocks/0-11/q` does."""
    return RANGE.search(key) is not None


def layers(key: str) -> list[str]:
    """The paths of the layers under `key`; of a key without a range, itself.

    Raises:
      UserError: `key` has two ranges, or one that does not ascend.
    """
    if len(RANGE.findall(key)) > 1:
        raise UserError(f"{key!r} holds two ranges of layers; only one axis can be stacked")
    paths = layers_of(key)
    if not paths:
        raise UserError(f"the range of layers in {key!r} does not ascend; write first-last")
    return paths


def layer_sharding(key: str, sharding: Sharding) -> Sharding:
    """Where one layer of the stacked array `key` lives: as within the stack, on all its stages."""
    if not isinstance(sharding, NamedSharding):
        if isinstance(sharding, SingleDeviceSharding):
            return sharding
        raise UserError(f"{key!r} has a {type(sharding).__name__}; stacks need a NamedSharding")
    return sharding.update(spec=PartitionSpec(*sharding.spec[1:]))


def _stacked_sharding(sharding: Sharding) -> Sharding:
    if not isinstance(sharding, NamedSharding):
        return sharding
    return sharding.update(spec=PartitionSpec(None, *sharding.spec))


def layer_structs(
    target: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.ShapeDtypeStruct]:
    """The single layers of `target`, each with its shape, dtype and sharding.

    A struct without a sharding is meant for the default device.

    Raises:
      UserError: a stacked shape does not begin with its number of layers, a sharding does not
        divide its shape, or two keys name one layer.
    """
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for key, struct in target.items():
        sharding = struct.sharding or SingleDeviceSharding(jax.local_devices()[0])
        shape, paths = tuple(struct.shape), layers(key)
        if is_stacked(key):
            _check_layers(key, shape, len(paths))
            shape, sharding = shape[1:], layer_sharding(key, sharding)
        try:
            sharding.shard_shape(shape)
        except ValueError as error:
            raise UserError(f"{key!r} cannot be placed: {error}") from None
        for path in paths:
            if path in found:
                raise UserError(f"two keys name the layer {path!r}")
            found[path] = jax.ShapeDtypeStruct(shape, struct.dtype, sharding=sharding)
    return found


def _check_layers(key: str, shape: tuple[int, ...], count: int) -> None:
    if not shape or shape[0] != count:
        raise UserError(f"{key!r} names {count} layers, but its array has the shape {shape}")


def groups(
    flat: Mapping[str, Array], count: Mapping[str, int] | None = None
) -> Iterator[dict[str, Array]]:
    """`flat` in parts that one program can take: the same devices, at most `GROUP_BYTES` each.

    `count` says how many arrays of its size stand behind a key (1 where it is not given).
    """
    by_devices: dict[tuple, dict[str, Array]] = {}
    for key, array in flat.items():
        by_devices.setdefault(_devices(array.sharding), {})[key] = array
    for arrays in by_devices.values():
        group, size = {}, 0
        for key, array in arrays.items():
            shard = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
            shard *= count[key] if count else 1
            if group and size + shard > GROUP_BYTES:
                yield group
                group, size = {}, 0
            group[key], size = array, size + shard
        yield group


def _devices(sharding: Sharding) -> tuple:
    if isinstance(sharding, NamedSharding):
        return tuple(d.id for d in sharding.mesh.devices.flat)
    return tuple(sorted(d.id for d in sharding.device_set))


def copy(flat: Mapping[str, Array]) -> dict[str, Array]:
    """Fresh buffers of the same shapes and shardings; donating `flat` afterwards is safe."""
    copies: dict[str, Array] = {}
    for group in groups(flat):
        placed = tuple((key, array.sharding) for key, array in group.items())
        copies |= _copy_program(placed)(group)
    return copies


@functools.lru_cache(maxsize=64)
def _copy_program(placed: tuple[tuple[str, Sharding], ...]):
    def run(flat):  # without a copy, jit would hand back the donatable buffer
        return {key: jnp.copy(array) for key, array in flat.items()}

    return jax.jit(run, out_shardings=dict(placed))


def unstack(flat: Mapping[str, Array]) -> dict[str, Array]:
    """Every layer by its own path, as fresh buffers: donating `flat` afterwards is safe.

    One program for each group of `groups`, so that a model of many arrays compiles once.

    Args:
      flat: [L, ...] arrays under keys with a range of layers, any array under other keys.
    """
    single: dict[str, Array] = {}
    for group in groups(flat):
        for key, array in group.items():
            if is_stacked(key):
                _check_layers(key, array.shape, len(layers(key)))
        placed = tuple((key, array.sharding) for key, array in group.items())
        single |= _unstack_program(placed)(dict(group))
    if len(single) != sum(len(layers(key)) for key in flat):
        raise UserError("two keys name the same layer; each layer must be held once")
    return single


@functools.lru_cache(maxsize=64)
def _unstack_program(placed: tuple[tuple[str, Sharding], ...]):
    def run(flat):
        single = {}
        for key, _ in placed:
            if not is_stacked(key):
                single[key] = jnp.copy(flat[key])  # else jit hands back the donatable buffer
                continue
            for index, path in enumerate(layers(key)):
                single[path] = flat[key][index]
        return single

    shardings = {}
    for key, sharding in placed:
        here = layer_sharding(key, sharding) if is_stacked(key) else sharding
        shardings |= dict.fromkeys(layers(key), here)
    return jax.jit(run, out_shardings=shardings)


def stack(
    flat: Mapping[str, Array],
    keys: Iterable[str],
    shardings: Mapping[str, Sharding | None] | None = None,
    *,
    donate: bool = False,
) -> dict[str, Array]:
    """The arrays `keys` built from single layers; the inverse of `unstack`.

    Args:
      flat: single layers by path; only those that `keys` name are used.
      keys: keys with or without a range.
      shardings: where stacked results live; by default as their layers do.
      donate: free the layers of each group as soon as its program is started. (XLA cannot alias
        a layer to a slice of the stack, so `donate_argnums` would only warn.)

    Raises:
      UserError: a layer is not in `flat`.
    """
    keys, shardings = list(keys), shardings or {}
    for key in keys:
        for path in layers(key):
            if path not in flat:
                raise UserError(f"{key!r} needs the layer {path!r}, which is not there")
    stacked = {key: flat[key] for key in keys if not is_stacked(key)}
    first = {layers(key)[0]: key for key in keys if is_stacked(key)}
    count = {path: len(layers(key)) for path, key in first.items()}
    for group in groups({path: flat[path] for path in first}, count):
        placed = tuple(
            (first[path], shardings.get(first[path]) or _stacked_sharding(array.sharding))
            for path, array in group.items()
        )
        inputs = {path: flat[path] for key, _ in placed for path in layers(key)}
        stacked |= _stack_program(placed)(inputs)
        if donate:
            for array in inputs.values():
                array.delete()
    return {key: stacked[key] for key in keys}


@functools.lru_cache(maxsize=64)
def _stack_program(placed: tuple[tuple[str, Sharding], ...]):
    def run(single):
        return {key: jnp.stack([single[path] for path in layers(key)]) for key, _ in placed}

    return jax.jit(run, out_shardings=dict(placed))


class Checksums:
    """The checksums of all layers of `flat`; the device computes, `result` waits.

    A checksum is the sum modulo 2**32 of a bijective mix (the finalizer of MurmurHash3, public
    domain) of each element's bits and its place in the layer. The sum does not depend on order, so
    neither sharding nor stacking changes it, and every process of a run can check its part. An
    error in one 32-bit word is always found, a wider one but for one chance in 2**32.
    """

    def __init__(self, flat: Mapping[str, Array]):
        self._parts = []
        for group in groups(flat):
            placed = tuple((key, array.sharding) for key, array in group.items())
            self._parts.append((list(group), _checksum_program(placed)(dict(group))))

    def result(self) -> dict[str, int]:
        """Checksum by path of the single layer."""
        paths = [path for keys, _ in self._parts for key in keys for path in layers(key)]
        values = [int(v) for _, part in self._parts for v in np.asarray(part)]
        return dict(zip(paths, values, strict=True))


@functools.lru_cache(maxsize=64)
def _checksum_program(placed: tuple[tuple[str, Sharding], ...]):
    def run(flat):
        return jnp.concatenate([_layer_sums(flat[key], is_stacked(key)) for key, _ in placed])

    sharding = placed[0][1]
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(run, out_shardings=sharding)


def _layer_sums(x: Array, stacked: bool) -> UInt32[Array, "L"]:
    words = _words(x if stacked else x[None])
    place = jnp.zeros(words.shape[1:], jnp.uint32)
    for axis, size in enumerate(words.shape[1:]):  # iotas fuse and shard; an arange would not
        place = place * jnp.uint32(size & 0xFFFFFFFF)
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape[1:], axis)
    mixed = words + (place + jnp.uint32(1)) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    mixed ^= mixed >> 16
    return mixed.sum(axis=tuple(range(1, mixed.ndim)), dtype=jnp.uint32)


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of each element as uint32; 64-bit elements give two words on a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)], axis=-1)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits == 64:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {2: jnp.uint2, 4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32}[bits]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
