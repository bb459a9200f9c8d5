"""Tensor trains against their definition, TT-SVD's bound, the PDE by a sparse solve, the stack."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
import scipy.sparse.linalg

from configs import stacked_tensorial as stacked_config
from efficient import data as data_lib
from efficient import model as model_lib
from efficient.data.poisson import ScreenedPoisson, solve
from efficient.errors import UserError
from efficient.linears.tensor_train import (
    TensorTrain,
    balanced,
    reachable_ranks,
    tensor_train_project,
)
from efficient.objectives.regression import Regression
from efficient.planning.flops import count_flops
from efficient.scope import Context, Rules, Scope
from models.operators import Network, Stacked

# (factors of the inputs, of the outputs, inner ranks)
TRAINS = [
    ([6], [5], []),
    ([3, 4], [5, 2], [6]),
    ([2, 3, 2], [3, 1, 4], [4, 5]),
    ([2, 2, 2, 3], [2, 3, 1, 2], [3, 5, 4]),
]
EVERY = pytest.mark.parametrize(("ins", "outs", "ranks"), TRAINS)


def layer(ins, outs, ranks, bias=False):
    sizes = int(np.prod(ins)), int(np.prod(outs))
    shapes = {"in_shape": ins, "out_shape": outs, "ranks": ranks}
    return TensorTrain(Scope(Rules()), *sizes, bias, **shapes)


def draw(module, seed=0):
    rng = np.random.default_rng(seed)
    return {p: rng.normal(size=v.shape) for p, v in model_lib.walk(module)}


def entries(values, ins, outs):
    """W by the definition: for every pair of multi-indices a product of matrices."""
    w = np.zeros((int(np.prod(ins)), int(np.prod(outs))))
    for row, a in enumerate(itertools.product(*map(range, ins))):
        for column, b in enumerate(itertools.product(*map(range, outs))):
            product = np.eye(1)
            for k, (i, j) in enumerate(zip(a, b, strict=True)):
                product = product @ values[f"core_{k}"][:, i, j, :]
            w[row, column] = product[0, 0]
    return w


def narrow(values):
    return {p: jnp.asarray(a, jnp.float32) for p, a in values.items()}


@EVERY
def test_value_and_gradients_by_the_definition(ins, outs, ranks):
    module = layer(ins, outs, ranks, bias=True)
    values, rng = draw(module), np.random.default_rng(1)
    w = entries(values, ins, outs)
    x, weight = rng.normal(size=(2, 3, w.shape[0])), rng.normal(size=(2, 3, w.shape[1]))

    def loss(values, x):
        y = model_lib.bind(module, values)(x, Context())
        return jnp.sum(y * weight), y

    grads = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (got, dx), y = grads(narrow(values), jnp.asarray(x, jnp.float32))
    scale = np.abs(w).max()
    np.testing.assert_allclose(y, x @ w + values["bias"], rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose(dx, weight @ w.T, rtol=1e-4, atol=1e-4 * scale)
    made = model_lib.bind(module, narrow(values)).materialize()
    np.testing.assert_allclose(made, w, rtol=1e-4, atol=1e-5 * scale)
    dw = np.einsum("bti,bto->io", x, weight)
    for name in values:  # W is linear in each core
        if name == "bias":
            continue
        direction = rng.normal(size=values[name].shape)
        wanted = np.sum(dw * entries(values | {name: direction}, ins, outs))
        np.testing.assert_allclose(np.sum(got[name] * direction), wanted, rtol=1e-3, atol=1e-3)


def unfolding(w, ins, outs, k):
    """W with the first k pairs of factors as rows and the others as columns."""
    d = len(ins)
    order = [axis for m in range(d) for axis in (m, d + m)]
    rows = int(np.prod(ins[:k])) * int(np.prod(outs[:k]))
    return w.reshape(*ins, *outs).transpose(order).reshape(rows, -1)


@EVERY
def test_projection_recovers_tensor_trains(ins, outs, ranks):
    module = layer(ins, outs, ranks)
    w = entries(draw(module), ins, outs)
    parts = module.project(jnp.asarray(w, jnp.float32))
    assert {p: a.shape for p, a in parts.items()} == {p: v.shape for p, v in model_lib.walk(module)}
    made = model_lib.bind(module, parts).materialize()
    np.testing.assert_allclose(made, w, rtol=1e-3, atol=1e-4 * np.abs(w).max())


@EVERY
def test_projection_keeps_its_error_bound(ins, outs, ranks):
    """Between the worst cut's error, below which no train of these ranks is, and the root sum."""
    w = np.random.default_rng(3).normal(size=(int(np.prod(ins)), int(np.prod(outs))))
    cores = tensor_train_project(jnp.asarray(w, jnp.float32), ins, outs, ranks)
    made = entries({f"core_{k}": np.float64(c) for k, c in enumerate(cores)}, ins, outs)
    tails = [
        np.sum(np.linalg.svd(unfolding(w, ins, outs, k + 1), compute_uv=False)[rank:] ** 2)
        for k, rank in enumerate(ranks)
    ]
    error = np.sum((made - w) ** 2)
    slack = 1e-5 * np.sum(w**2)
    assert max(tails, default=0.0) - slack <= error <= sum(tails) + slack
    if ranks:
        assert 0.01 * np.sum(w**2) < error < np.sum(w**2)


@EVERY
def test_parameters_and_flops(ins, outs, ranks):
    module = layer(ins, outs, ranks)
    shapes = model_lib.abstract(module)
    ends = [1, *ranks, 1]
    total, flops = 0, 0
    for k, (i, j) in enumerate(zip(ins, outs, strict=True)):
        total += ends[k] * i * j * ends[k + 1]
        flops += 2 * ends[k] * ends[k + 1] * int(np.prod(outs[: k + 1])) * int(np.prod(ins[k:]))
    assert sum(int(np.prod(s.shape)) for s in shapes.values()) == total
    x = jax.ShapeDtypeStruct((7, int(np.prod(ins))), jnp.float32)
    counted = count_flops(lambda v, x: model_lib.bind(module, v)(x, Context()), shapes, x)
    assert counted == 7 * module.flops() == 7 * flops


def test_initial_variance_is_that_of_a_dense_layer():
    module = TensorTrain(Scope(Rules()), 64, 48, False, rank=6)
    rng = np.random.default_rng(0)
    cores = [
        v.get_metadata("init_fn").std * rng.normal(size=(50, *v.shape))
        for _, v in model_lib.walk(module)
    ]
    w = np.einsum("nhaei,nibfj,njcgk->nabcefg", *cores)
    np.testing.assert_allclose(np.mean(w**2), 1 / 64, rtol=0.1)


def test_balanced_factors():
    assert balanced(64, 3) == [4, 4, 4] and balanced(192, 3) == [4, 6, 8]
    assert balanced(256, 3) == [4, 8, 8] and balanced(7, 2) == [1, 7] and balanced(12, 1) == [12]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_shape": [4, 5]}, r"in_shape=\[4, 5\] does not make 24; \[4, 6\] does"),
        ({"in_shape": [4, 6]}, "must have as many factors"),
        ({"rank": 100}, "rank=100 must be from 1 to 12"),
        ({"rank": 0}, "rank=0 must be from 1"),
        ({"order": 0}, "order=0 must be 1 or more"),
        ({"ranks": [1, 1, 1]}, "must be 2 numbers from 1 to"),
        ({"ranks": [3, 99]}, "must be 2 numbers from 1 to"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        TensorTrain(Scope(Rules()), 24, 27, False, **arguments)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([1, 16, 4], r"rank 16 of cut 2 can be at most 4 .* work are \[1, 4, 4\]"),
        ([4, 16, 1], r"rank 16 of cut 2 can be at most 4 .* work are \[4, 4, 1\]"),
        ([4, 9, 2], r"rank 9 of cut 2 can be at most 8 .* work are \[4, 8, 2\]"),
    ],
)
def test_ranks_that_a_neighbour_cannot_carry_are_refused(ranks, words):
    """Each within the products of all factors on either side; the ranks that are named work."""
    factors, matrix = [2, 2, 2, 2], jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)))
    with pytest.raises(UserError, match=words) as error:
        layer(factors, factors, ranks)
    with pytest.raises(UserError, match=words):
        tensor_train_project(matrix, factors, factors, ranks)
    near = list(map(int, str(error.value).rsplit("[", 1)[1].rstrip("]").split(", ")))
    module = layer(factors, factors, near)
    parts = module.project(matrix)
    assert {p: a.shape for p, a in parts.items()} == {p: v.shape for p, v in model_lib.walk(module)}
    assert [np.linalg.matrix_rank(c.reshape(-1, c.shape[-1])) for c in parts.values()] == [*near, 1]


def test_one_rank_for_all_cuts_can_be_carried():
    shapes = {"in_shape": [2, 3, 1, 2], "out_shape": [3, 2, 4, 3]}
    for rank in range(1, 25):
        module = TensorTrain(Scope(Rules()), 12, 72, False, rank=rank, **shapes)
        assert reachable_ranks(module.ranks, *shapes.values()) == list(module.ranks)


def sparse_solve(boundary, kappa, height):
    """The five-point equations, point by point, and a sparse LU of them."""
    n = boundary.shape[1]
    step_x, step_y = 1 / (n + 1), height / (n + 1)
    system, known = scipy.sparse.lil_matrix((n * n, n * n)), np.zeros(n * n)
    for i in range(n):
        for j in range(n):
            at = i * n + j
            system[at, at] = 2 / step_x**2 + 2 / step_y**2 + kappa
            sides = [(i - 1, j, step_x, 0), (i + 1, j, step_x, 1)]
            sides += [(i, j - 1, step_y, 2), (i, j + 1, step_y, 3)]
            for p, q, step, side in sides:
                if 0 <= p < n and 0 <= q < n:
                    system[at, p * n + q] = -1 / step**2
                else:
                    known[at] += boundary[side, j if side < 2 else i] / step**2
    return scipy.sparse.linalg.spsolve(system.tocsc(), known).reshape(n, n)


@pytest.mark.parametrize(("kappa", "height"), [(0.1, 0.5), (7.0, 1.3), (100.0, 2.0)])
def test_solution_of_the_differences(kappa, height):
    boundary = np.random.default_rng(0).normal(size=(4, 9))
    wanted = sparse_solve(boundary, kappa, height)
    np.testing.assert_allclose(solve(boundary, kappa, height), wanted, rtol=1e-9, atol=1e-12)


def test_solution_of_the_equation():
    """sin(pi y / h) sinh(m x) / sinh(m), m^2 = kappa + (pi / h)^2: the error falls as step^2."""
    kappa, height, errors = 5.0, 1.5, []
    m = np.sqrt(kappa + (np.pi / height) ** 2)
    for n in (15, 31, 63):
        at = np.arange(1, n + 1) / (n + 1)
        boundary = np.zeros((4, n))
        boundary[1] = np.sin(np.pi * at)
        exact = np.sinh(m * at)[:, None] / np.sinh(m) * np.sin(np.pi * at)
        errors.append(np.abs(solve(boundary, kappa, height) - exact).max())
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4.0, rtol=0.03)
    assert errors[0] < 2e-3


def test_examples_are_solutions_and_splits_differ():
    train, held = (
        data_lib.make_source("screened_poisson", split, grid=8, train_size=64, eval_size=16)
        for split in ("train", "eval")
    )
    assert train.facts == {"in_features": 32, "out_features": 64, "parameters": 2}
    example = train[5]
    place = np.float64(example["parameters"])
    kappa = 0.1 * 1000 ** ((place[0] + 1) / 2)
    wanted = sparse_solve(np.float64(example["data"]).reshape(4, 8), kappa, 1.25 + 0.75 * place[1])
    np.testing.assert_allclose(example["target"].reshape(8, 8), wanted, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(train[5]["data"], example["data"])
    assert np.abs(train[5]["data"] - held[5]["data"]).max() > 0.1


@functools.cache
def fields(count, seed, least=-1.0, most=1.0):
    """Examples at parameters from `least` to `most`, of the ranges of training."""
    task, rng, examples = ScreenedPoisson(8), np.random.default_rng(seed), []
    for _ in range(count):
        examples.append(task.sample(rng))
    return {n: jnp.asarray(np.stack([e[n] for e in examples])) for n in examples[0]}


SIZES = {"in_features": 32, "out_features": 64, "parameters": 2}
TRAIN = {"at": "maps/.*", "use": "tensor_train", "rank": 8, "order": 2}


def stack(rules=(TRAIN,), **arguments):
    sizes = SIZES | {"stacks": 8, "hidden": 16, "depth": 2} | arguments
    return Stacked(Scope(Rules(list(rules))), **sizes)


def test_stack_is_a_weighted_sum_of_its_maps():
    model = stack(stacks=3)
    values, batch = draw(model), fields(5, 0)
    got = model_lib.bind(model, narrow(values))(batch, Context())
    h = np.float64(batch["parameters"])
    for i in range(2):
        h = np.maximum(h @ values[f"embed/{i}/kernel"] + values[f"embed/{i}/bias"], 0)
    h = h @ values["mix/kernel"] + values["mix/bias"]
    weights = np.exp(h - h.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    wanted = 0
    for k in range(3):
        own = {p.removeprefix(f"maps/{k}/"): a for p, a in values.items()}
        w = entries(own, balanced(32, 2), balanced(64, 2))
        wanted = wanted + weights[:, k, None] * (np.float64(batch["data"]) @ w)
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


def test_solutions_are_linear_in_the_data_and_so_is_the_stack():
    model, batch = stack(stacks=2), fields(5, 0)
    values = model_lib.init(model, jax.random.key(0))
    one = model_lib.bind(model, values)(batch, Context())
    scaled = model_lib.bind(model, values)(batch | {"data": -3 * batch["data"]}, Context())
    np.testing.assert_allclose(scaled, -3 * one, rtol=1e-4, atol=1e-5)
    network = Network(Scope(Rules()), **SIZES, hidden=8)
    values = model_lib.init(network, jax.random.key(0))
    bound = model_lib.bind(network, values)
    moved = bound(batch | {"data": -3 * batch["data"]}, Context())
    assert np.abs(moved + 3 * bound(batch, Context())).max() > 0.1


def test_objective_against_numpy():
    batch = fields(5, 0)
    model = Network(Scope(Rules()), **SIZES, hidden=8)
    bound = model_lib.bind(model, model_lib.init(model, jax.random.key(0)))
    error = np.float64(bound(batch, Context())) - np.float64(batch["target"])
    weight = np.array([1, 1, 0, 1, 0], np.float32)
    loss, metrics = Regression()(bound, batch | {"weight": jnp.asarray(weight)}, Context())
    kept = weight > 0
    np.testing.assert_allclose(loss, np.mean(error[kept] ** 2), rtol=1e-5)
    size = np.linalg.norm(error, axis=1) / np.linalg.norm(np.float64(batch["target"]), axis=1)
    np.testing.assert_allclose(metrics["relative_error"], size[kept].mean(), rtol=1e-5)
    assert metrics["weight"] == 3 and metrics["loss"] == loss


@functools.cache
def trained(name, steps=1000):
    """(number of parameters, the fitted model) on 3,000 examples, batches of 64."""
    model = stack() if name == "stack" else Network(Scope(Rules()), **SIZES, hidden=66)
    values, source = model_lib.init(model, jax.random.key(0)), fields(3000, 0)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    def step(carry, key):
        values, state = carry
        rows = jax.random.randint(key, (64,), 0, 3000)
        batch = {n: a[rows] for n, a in source.items()}
        grads = jax.grad(lambda v: Regression()(model_lib.bind(model, v), batch, Context())[0])
        updates, state = optimizer.update(grads(values), state, values)
        return (optax.apply_updates(values, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    run = jax.jit(lambda v: jax.lax.scan(step, (v, optimizer.init(v)), keys)[0][0])
    return sum(a.size for a in values.values()), model_lib.bind(model, run(values))


@pytest.mark.slow
def test_stack_beats_a_dense_network_of_as_many_parameters():
    size, model = trained("stack")
    rival_size, rival = trained("network")
    assert abs(rival_size - size) < 0.01 * size
    held = fields(400, 1)
    found, other = (Regression()(m, held, Context())[1]["relative_error"] for m in (model, rival))
    assert found < 0.11 and other > 2 * found


def test_config_has_networks_of_equal_size():
    sizes = {}
    for mode in stacked_config.MODES:
        config = stacked_config.get_config(f"mode={mode}")
        host = Network if mode == "network" else Stacked
        arguments = {n: v for n, v in config.model.items() if n != "name"}
        shapes = model_lib.abstract(host(Scope(Rules(config.rules)), **arguments))
        sizes[mode] = sum(int(np.prod(s.shape)) for s in shapes.values())
    assert sizes == {"tensorial": 21_654, "network": 21_574, "dense": 133_270}
    with pytest.raises(UserError, match="did you mean 'dense'"):
        stacked_config.get_config("mode=dens")
