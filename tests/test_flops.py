"""`count_flops` against formulas written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, PartitionSpec

from efficient.planning.flops import count_flops, flop_count, window_taps

B, D, F, L = 8, 16, 32, 5


def _array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_chain_of_products():
    got = count_flops(lambda x, w, v: (x @ w) @ v, _array(B, D), _array(D, F), _array(F, D))
    assert got == 2 * B * D * F + 2 * B * F * D


def test_batched_einsum_and_jit():
    fn = jax.jit(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k))
    assert count_flops(fn, _array(2, 7, 3, 4), _array(2, 9, 3, 4)) == 2 * (2 * 3 * 7 * 9 * 4)


def _stack(remat):
    def block(x, w):
        return jnp.tanh(jnp.tanh(x @ w["up"]) @ w["down"]), None

    def loss(weights, x):
        return jax.lax.scan(jax.checkpoint(block) if remat else block, x, weights)[0].sum()

    weights = {"up": _array(L, D, F), "down": _array(L, F, D)}
    return jax.grad(loss), weights


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_a_scan(remat):
    fn, weights = _stack(remat)
    count = flop_count(fn, weights, _array(B, D))
    one = 2 * B * D * F
    forward, backward = 2 * one * L, 4 * one * L
    assert count.model == forward + backward
    # tanh's derivative needs the outputs of both products, so both are computed again.
    assert count.recomputed == (forward if remat else 0)
    assert count.total == count.model + count.recomputed
    assert count.notes == ()


def test_recomputation_leaves_out_what_the_gradient_does_not_need():
    def loss(w, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)(w, x).sum()

    count = flop_count(jax.grad(loss), _array(D, D), _array(B, D))
    assert count.recomputed == 2 * B * D * D  # the first product only
    # Forward: nothing of the value is asked for, so the forward product outside is dead too.
    assert count.model == 3 * 2 * B * D * D


def test_shard_map_counts_every_shard():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4), ("data",))
    spec = PartitionSpec("data")

    def fn(x, w):
        body = lambda x, w: x @ w  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(
            x, w
        )

    assert count_flops(fn, _array(B, D), _array(D, F)) == 2 * B * D * F

    def replicated(x, w):
        body = lambda x, w: x @ w  # noqa: E731
        everywhere = PartitionSpec()
        return jax.shard_map(
            body, mesh=mesh, in_specs=(everywhere, everywhere), out_specs=everywhere
        )(x, w)

    assert count_flops(replicated, _array(B, D), _array(D, F)) == 4 * 2 * B * D * F


def test_platform_dependent_takes_the_targets_branch():
    def fn(x):
        return jax.lax.platform_dependent(
            x, tpu=lambda x: x @ x, cuda=lambda x: x @ x @ x, default=lambda x: x @ x @ x @ x
        )

    one = 2 * D**3
    x = _array(D, D)
    assert count_flops(fn, x, platform="tpu") == one
    assert count_flops(fn, x, platform="cuda") == 2 * one
    assert count_flops(fn, x, platform="cpu") == count_flops(fn, x) == 3 * one


def test_cond_is_its_dearest_branch_and_says_so():
    fn = lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    count = flop_count(fn, _array(dtype=bool), _array(D, D))
    assert count.total == 2 * D**3
    assert "cond" in count.notes[0]


def test_while_of_unknown_length_says_so():
    fn = lambda n, x: jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)  # noqa: E731
    count = flop_count(fn, _array(dtype=jnp.int32), _array(D, D))
    assert count.total == 2 * D**3
    assert "while" in count.notes[0]
    known = lambda x: jax.lax.fori_loop(0, 7, lambda i, x: x @ x, x)  # noqa: E731
    assert flop_count(known, _array(D, D)).total == 7 * 2 * D**3


def test_custom_vjp_counts_its_own_backward():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g @ x @ x @ x,))
    fn = jax.value_and_grad(lambda x: square(x).sum())
    assert count_flops(fn, _array(D, D)) == (1 + 3) * 2 * D**3


def test_dead_code_is_free():
    def fn(x):
        del_me = x @ x  # noqa: F841
        return x + 1

    assert count_flops(fn, _array(D, D)) == 0


def test_pallas_kernel_counts_its_grid():
    def kernel(x, w, o):
        o[...] = jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    call = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[
            pl.BlockSpec((8, 128), lambda i: (i, 0)),
            pl.BlockSpec((128, 128), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
        out_shape=_array(32, 128),
    )
    count = flop_count(call, _array(32, 128), _array(128, 128))
    assert count.total == count.kernels == 2 * 32 * 128 * 128


def test_ragged_dot():
    fn = jax.lax.ragged_dot
    sizes = _array(3, dtype=jnp.int32)
    assert count_flops(fn, _array(B, D), _array(3, D, F), sizes) == 2 * B * D * F


@pytest.mark.parametrize(("stride", "low", "lhs_dilate", "rhs_dilate"), [
    (1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (3, 2, 1, 2), (1, 3, 3, 2),
])  # fmt: skip
def test_window_taps_against_a_convolution_of_ones(stride, low, lhs_dilate, rhs_dilate):
    size, kernel = 11, 3
    out = jax.lax.conv_general_dilated(
        jnp.ones((1, 1, size)), jnp.ones((1, 1, kernel)), (stride,), [(low, low)],
        lhs_dilation=(lhs_dilate,), rhs_dilation=(rhs_dilate,),
    )  # fmt: skip
    got = window_taps(
        size, kernel, out.shape[2], stride=stride, low=low,
        lhs_dilate=lhs_dilate, rhs_dilate=rhs_dilate,
    )  # fmt: skip
    assert got == int(out.sum()) > 0


def test_convolution_and_its_gradients():
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x, w = _array(2, 9, 9, 3), _array(3, 3, 3, 4)
    forward = 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert count_flops(conv, x, w) == forward
    grads = jax.grad(lambda x, w: conv(x, w).sum(), argnums=(0, 1))
    assert count_flops(grads, x, w) == 2 * forward  # the value itself is dead
    depthwise = functools.partial(conv, feature_group_count=3)
    assert count_flops(depthwise, x, _array(3, 3, 1, 3)) == 2 * (2 * 4 * 4 * 3) * 9


def test_a_shard_map_within_another_counts_the_shards_of_its_own_axes():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))

    def inner(x):
        return jax.shard_map(
            lambda y: y @ y.T,
            mesh=jax.sharding.get_abstract_mesh(),
            in_specs=PartitionSpec("b"),
            out_specs=PartitionSpec("b"),
            axis_names={"b", "c"},
            check_vma=False,
        )(x)

    outer = jax.shard_map(
        inner,
        mesh=mesh,
        in_specs=PartitionSpec("a"),
        out_specs=PartitionSpec("a"),
        axis_names={"a"},
        check_vma=False,
    )
    # Each of the eight devices multiplies [2, 8] by [8, 2].
    assert count_flops(jax.jit(outer), _array(8, 8)) == 8 * 2 * 2 * 2 * 8
