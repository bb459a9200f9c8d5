"""Adam for `sparse_spectral` layers: all singular values, and singular vectors a few at a time.

The optimizer of "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural
Networks", Zhao et al. 2025, arXiv 2405.15481; the layer, and what its gradients are, is in
`efficient.linears.sparse_spectral`. Arrays u, s and v of one path are W = U diag(s) V^T. Time goes
in iterations of `interval` steps and rounds of ceil(m / r) iterations. With A adam's direction

    at the start of an iteration
        r columns i without replacement, p(i) = (1 / m + s_i / sum(s)) / 2; moments of u, v at 0
    at every step
        s    <- max(s - learning_rate A(ds), 0)                       all of them
        u_i  <- (u_i - learning_rate A(du_i)) / |...|                 the r columns; v_i alike
    at the end of a round
        U, s, V <- svd(U diag(s) V^T); moments of s at 0

so moments are 2 r (I + O) + 2 m numbers in place of 2 I O. In an iteration's first
`warmup` steps the columns' learning rate rises linearly. Weight decay shrinks s, and W with it. All
other arrays are AdamW's.

The draw depends on `seed`, the step, the layer and s alone, not on what is stacked.

The columns' update is a step followed by a projection, so it has the learning rate inside: a
`parameters` rule that scales the learning rate of u, s or v would scale the projection too.
"""

import functools
import re
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from efficient.errors import UserError
from efficient.model import layers_of
from efficient.optimizers.common import (
    Mask,
    Schedule,
    check_numbers,
    is_stacked,
    per_layer,
    scheduled,
)
from efficient.registry import register


class Moments(NamedTuple):
    """Running averages of a gradient and of its square."""

    mu: Float[Array, "..."]
    nu: Float[Array, "..."]


class Layer(NamedTuple):
    """State of one layer: columns in training, moments of theirs [_, r] and of s [m]."""

    columns: Int[Array, " r"]
    u: Moments
    s: Moments
    v: Moments


class SpectralState(NamedTuple):
    """State of spectral layers by path, and of AdamW for everything else."""

    count: Int[Array, ""]
    layers: dict[str, Layer]
    others: Any


def draw_columns(key: Array, s: Float[Array, " m"], rank: int) -> Int[Array, " r"]:
    """`rank` different columns, one after another with p(i) = (1 / m + s_i / sum(s)) / 2."""
    total = jnp.maximum(s.sum(), jnp.finfo(jnp.float32).tiny)
    p = 0.5 * (1 / s.size + s / total)
    return jax.random.choice(key, s.size, (rank,), replace=False, p=p)


def initial_layer(u: Array, s: Array, v: Array, rank: int) -> Layer:
    """State before the first step."""
    rank = min(rank, s.shape[-1])

    def zeros(shape):
        return Moments(jnp.zeros(shape), jnp.zeros(shape))

    columns = jnp.zeros((*s.shape[:-1], rank), jnp.int32)
    of_u, of_v = (zeros((*x.shape[:-1], rank)) for x in (u, v))
    return Layer(columns, of_u, zeros(s.shape), of_v)


def decompose(path: str, parts: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Orthonormal U and V and descending s of the same U diag(s) V^T."""

    def one(parts):
        u, s, v = parts
        with jax.default_matmul_precision("highest"):
            u, s, vt = jnp.linalg.svd((u * s) @ v.T, full_matrices=False)
        return u, s, vt.T

    # Layer by layer, not batched: see efficient.optimizers.gwnlp.
    return jax.lax.map(one, parts) if is_stacked(path) else one(parts)


def spectral_paths(params: dict[str, Array], at: str) -> list[str]:
    """Paths of the layers that hold u, s and v and match `at`."""
    found = [p.removesuffix("/s") for p in params if p.endswith("/s")]
    found = [p for p in found if f"{p}/u" in params and f"{p}/v" in params]
    return [p for p in found if re.fullmatch(at, p)]


def layer_keys(path: str, seed: int, iteration: Int[Array, ""]) -> Array:
    """Keys of the layers at `path`, a single one where it is not stacked."""
    key = jax.random.fold_in(jax.random.key(seed), iteration)
    hashes = np.array([zlib.crc32(p.encode()) for p in layers_of(path)], np.uint32)
    keys = jax.vmap(lambda h: jax.random.fold_in(key, h))(jnp.asarray(hashes))
    return keys if is_stacked(path) else keys[0]


def adam_direction(g, moments, steps, b1, b2, eps) -> tuple[Array, Moments]:
    """m_hat / (sqrt(v_hat) + eps) after `steps` gradients, this one included, and the moments."""
    mu, nu = b1 * moments.mu + (1 - b1) * g, b2 * moments.nu + (1 - b2) * g**2
    direction = (mu / (1 - b1**steps)) / (jnp.sqrt(nu / (1 - b2**steps)) + eps)
    return direction, Moments(mu, nu)


def layer_step(parts, grads, layer, key, *, adam, lr, warm, decay, age, in_round):
    """One step of one layer, up to the decomposition: (u, s, v) and its state.

    Args:
      parts, grads: u, s, v and their gradients.
      adam: (gradient, moments, steps) -> (direction, moments).
      lr, warm, decay: the learning rate, what the columns' is multiplied by, and what s loses.
      age, in_round: steps since the iteration and the round began.
    """
    (u, s, v), (du, ds, dv), tiny = parts, grads, jnp.finfo(jnp.float32).tiny
    rank = layer.columns.shape[-1]
    columns = jnp.where(age == 0, draw_columns(key, s, rank), layer.columns)

    def renewed(moments, since):
        return jax.tree.map(lambda m: jnp.where(since == 0, 0.0, m), moments)

    def vectors(x, g, moments):
        direction, moments = adam(g[:, columns], renewed(moments, age), age + 1)
        moved = x[:, columns] - lr * warm * direction
        norm = jnp.sqrt(jnp.sum(moved**2, axis=0))
        return x.at[:, columns].set(moved / jnp.maximum(norm, tiny)), moments

    direction, of_s = adam(ds, renewed(layer.s, in_round), in_round + 1)
    s = jnp.maximum(s - lr * direction - decay * s, 0.0)
    (u, of_u), (v, of_v) = vectors(u, du, layer.u), vectors(v, dv, layer.v)
    return (u, s, v), Layer(columns, of_u, of_s, of_v)


def sparse_spectral_adam(
    learning_rate: float | Schedule,
    decay_mask: Mask,
    *,
    b1: float | Array,
    b2: float | Array,
    eps: float,
    weight_decay: float | Array,
    rank: int,
    interval: int,
    warmup: int,
    seed: int,
    at: str,
) -> optax.GradientTransformation:
    """See the module."""
    adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)
    adam = functools.partial(adam_direction, b1=b1, b2=b2, eps=eps)

    def split(params):
        paths = spectral_paths(params, at)
        own = {f"{p}/{name}" for p in paths for name in "usv"}
        return paths, {p: x for p, x in params.items() if p not in own}

    def init(params):
        paths, others = split(params)
        if not paths:
            raise UserError(
                f"sst_adam: at='{at}' matches no trained u, s and v; give layers"
                " use='sparse_spectral', or take adamw"
            )
        layers = {p: initial_layer(*(params[f"{p}/{n}"] for n in "usv"), rank) for p in paths}
        return SpectralState(jnp.zeros((), jnp.int32), layers, adamw.init(others))

    def update(updates, state, params):
        paths, others = split(updates)
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        age = state.count % interval
        warm = jnp.minimum(1.0, (age + 1) / warmup) if warmup else 1.0
        decays = decay_mask(params)
        others = {p: params[p] for p in others}
        new, others = adamw.update({p: updates[p] for p in others}, state.others, others)
        layers = {}
        for path in paths:
            parts, grads = (tuple(d[f"{path}/{n}"] for n in "usv") for d in (params, updates))
            iterations = -(-parts[1].shape[-1] // state.layers[path].columns.shape[-1])
            in_round = state.count % (interval * iterations)
            decay = lr * weight_decay * decays[f"{path}/s"]
            rates = {"lr": lr, "warm": warm, "decay": decay, "age": age, "in_round": in_round}
            step = functools.partial(layer_step, adam=adam, **rates)
            key = layer_keys(path, seed, state.count // interval)
            moved, layers[path] = per_layer(step, path, parts, grads, state.layers[path], key)
            last = in_round == interval * iterations - 1
            moved = jax.lax.cond(last, functools.partial(decompose, path), lambda m: m, moved)
            new |= {f"{path}/{n}": a - b for n, a, b in zip("usv", moved, parts, strict=True)}
        count = optax.safe_increment(state.count)
        return {p: new[p] for p in updates}, SpectralState(count, layers, others)

    return optax.GradientTransformation(init, update)


@register("optimizer", "sst_adam")
def sst_adam(
    learning_rate: float | Schedule,
    decay_mask: Mask,
    *,
    b1: float | Schedule = 0.9,
    b2: float | Schedule = 0.999,
    eps: float = 1e-8,
    weight_decay: float | Schedule = 0.0,
    rank: int = 64,
    interval: int = 200,
    warmup: int = 20,
    seed: int = 0,
    at: str = r".*",
) -> optax.GradientTransformation:
    """Adam of all singular values and of `rank` singular vectors a side of each spectral layer.

    Args:
      rank: r, columns in training at a time; a layer of fewer trains all.
      interval: steps of an iteration. The authors take 200.
      warmup: steps at the start of an iteration over which the columns' learning rate rises. The
        authors take 20.
      seed: of the columns that are drawn.
      at: pattern of the paths of layers.
    """
    check_numbers(b1=b1, b2=b2, weight_decay=weight_decay)
    if rank < 1 or interval < 1:
        raise UserError(f"sst_adam: rank and interval must be 1 or more, got {rank} and {interval}")
    if not 0 <= warmup <= interval:
        raise UserError(f"sst_adam: warmup={warmup} must be from 0 to interval={interval}")

    def build(b1, b2, weight_decay):
        rates = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
        rules = {"rank": rank, "interval": interval, "warmup": warmup, "seed": seed, "at": at}
        return sparse_spectral_adam(learning_rate, decay_mask, **rates, **rules)

    return scheduled(build, b1=b1, b2=b2, weight_decay=weight_decay)
