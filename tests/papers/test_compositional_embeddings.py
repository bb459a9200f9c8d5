"""Compositional embeddings: partitions, uniqueness, table sizes, the tied head, hashing."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient import model as model_lib
from efficient.embeddings.compositional import Compositional, default_sizes, partition_indices
from efficient.errors import UserError
from efficient.scope import Context, Rules, Scope

# (partition, sizes, categories): the trick, three and four tables, and remainders alone.
PARTITIONS = [
    ("mixed_radix", (4, 5), 18),
    ("mixed_radix", (4, 3, 5), 57),
    ("mixed_radix", (2, 3, 4, 5), 120),
    ("chinese_remainder", (4, 5), 20),
    ("chinese_remainder", (3, 4, 5), 60),
]
OPERATIONS = ["multiply", "add", "concat"]


def build(vocab_size=18, width=12, **arguments):
    return Compositional(Scope(Rules()), vocab_size, width, **arguments)


def draw(module, seed=0):
    rng = np.random.default_rng(seed)
    shapes = model_lib.abstract(module)
    return {p: jnp.asarray(rng.normal(size=s.shape), s.dtype) for p, s in shapes.items()}


def numpy_tuple(category, sizes, partition):
    """The rows of one category, by Python integers."""
    if partition == "chinese_remainder":
        return tuple(category % m for m in sizes)
    return tuple(category // math.prod(sizes[:j]) % m for j, m in enumerate(sizes))


def numpy_table(values, sizes, partition, operation, vocab_size):
    tables = [np.asarray(values[f"table_{j}"], np.float64) for j in range(len(sizes))]
    combine = {"multiply": np.prod, "add": np.sum}
    out = []
    for category in range(vocab_size):
        at = numpy_tuple(category, sizes, partition)
        rows = [t[i] for t, i in zip(tables, at, strict=True)]
        joined = np.concatenate(rows) if operation == "concat" else combine[operation](rows, axis=0)
        out.append(joined)
    return np.array(out)


@pytest.mark.parametrize(("partition", "sizes", "vocab_size"), PARTITIONS)
def test_every_category_has_its_own_tuple_of_rows(partition, sizes, vocab_size):
    found = np.stack(partition_indices(jnp.arange(vocab_size), sizes, partition), axis=1)
    assert (found >= 0).all() and (found < np.array(sizes)).all()
    expected = [numpy_tuple(c, sizes, partition) for c in range(vocab_size)]
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) == vocab_size


def test_two_tables_are_the_quotient_and_the_remainder():
    remainder, quotient = partition_indices(jnp.arange(18), (4, 5), "mixed_radix")
    np.testing.assert_array_equal(remainder, np.arange(18) % 4)
    np.testing.assert_array_equal(quotient, np.arange(18) // 4)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("partition", "sizes", "vocab_size"), PARTITIONS)
def test_vectors_equal_numpy(partition, sizes, vocab_size, operation):
    module = build(vocab_size, sizes=list(sizes), partition=partition, operation=operation)
    values = draw(module)
    tokens = np.random.default_rng(1).integers(0, vocab_size, (2, 7))
    x = model_lib.bind(module, values)(jnp.asarray(tokens), Context())
    expected = numpy_table(values, sizes, partition, operation, vocab_size)[tokens]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("partition", ["mixed_radix", "chinese_remainder"])
def test_every_category_has_its_own_vector(operation, partition):
    module = build(256, partition=partition, operation=operation)
    values = model_lib.init(module, jax.random.key(0))
    table = np.asarray(model_lib.bind(module, values).materialize())
    distance = np.abs(table[:, None] - table[None]).max(-1) + np.eye(256)
    assert distance.min() > 1e-3 * table.std()
    # As a full table's, up to the spread of a sample: the values are drawn from few rows. Over 60
    # draws the standard deviation of this was at most 0.070, 0.037 and 0.051; four times that.
    spread = {"multiply": 0.28, "add": 0.15, "concat": 0.21}[operation]
    np.testing.assert_allclose(table.std(), 0.02, rtol=spread)


@pytest.mark.parametrize("vocab_size", [10, 256, 1000, 50_257, 10_000_000])
def test_tables_are_as_small_as_claimed(vocab_size):
    for partition in ("mixed_radix", "chinese_remainder"):
        sizes = default_sizes(vocab_size, partition)
        assert math.prod(sizes) >= vocab_size
        assert sum(sizes) <= 2 * math.sqrt(vocab_size) + 3
    rows = {p: s.shape for p, s in model_lib.abstract(build(vocab_size, width=8)).items()}
    root = math.isqrt(vocab_size - 1) + 1
    assert rows == {"table_0": (root, 8), "table_1": (-(-vocab_size // root), 8)}


def test_concatenated_tables_share_the_width():
    module = build(57, width=12, sizes=[4, 3, 5], operation="concat")
    assert [s.shape for s in model_lib.abstract(module).values()] == [(4, 4), (3, 4), (5, 4)]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("partition", "sizes", "vocab_size"), PARTITIONS[1::2])
def test_tied_head_scores_every_composed_vector(partition, sizes, vocab_size, operation):
    module = build(vocab_size, sizes=list(sizes), partition=partition, operation=operation)
    values = draw(module)
    x = np.random.default_rng(2).normal(size=(2, 3, 12))
    attend = jax.jit(lambda v, x: model_lib.bind(module, v).attend(x, Context()))
    expected = x @ numpy_table(values, sizes, partition, operation, vocab_size).T
    np.testing.assert_allclose(attend(values, jnp.asarray(x, jnp.float32)), expected, atol=1e-3)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_equal_finite_differences_of_numpy(operation):
    module = build(18, sizes=[4, 5], operation=operation)
    values = draw(module)
    tokens, weight = np.array([[0, 5, 5, 17]]), np.random.default_rng(3).normal(size=(1, 4, 12))

    def loss(values):
        return jnp.sum(model_lib.bind(module, values)(jnp.asarray(tokens), Context()) * weight)

    grads = jax.grad(loss)(values)
    for path, grad in grads.items():
        direction = np.random.default_rng(4).normal(size=grad.shape)
        sides = []
        for step in (1e-4, -1e-4):
            moved = {p: np.asarray(a, np.float64) for p, a in values.items()}
            moved[path] = moved[path] + step * direction
            table = numpy_table(moved, (4, 5), "mixed_radix", operation, 18)
            sides.append(np.sum(table[tokens] * weight))
        expected = (sides[0] - sides[1]) / 2e-4
        np.testing.assert_allclose(np.sum(grad * direction), expected, rtol=1e-4, atol=1e-4)
    unused = set(range(5)) - {0, 1, 4}
    assert not np.abs(grads["table_1"][jnp.array(sorted(unused))]).any()


def test_fits_categories_that_the_hashing_trick_confuses():
    """Equal memory, gradient descent on one random target vector a category."""
    vocab_size, width, rng = 36, 12, np.random.default_rng(5)
    target = jnp.asarray(rng.normal(size=(vocab_size, 1)), jnp.float32)
    module = build(vocab_size, width)  # 6 + 6 rows
    hashed = jnp.arange(vocab_size) % 12  # 12 rows

    def fit(table_of, values):
        values = values | {"readout": jnp.asarray(rng.normal(size=(width, 1)), jnp.float32) / 3}

        def loss(values):
            return jnp.mean((table_of(values) @ values["readout"] - target) ** 2)

        def step(values, _):
            grads = jax.grad(loss)(values)
            return jax.tree.map(lambda v, g: v - 0.3 * g, values, grads), None

        values, _ = jax.jit(lambda v: jax.lax.scan(step, v, length=4000))(values)
        return float(loss(values))

    composed = fit(lambda v: model_lib.bind(module, v).materialize(), draw(module))
    table = {"table": jnp.asarray(rng.normal(size=(12, width)), jnp.float32)}
    confused = fit(lambda v: v["table"][hashed], table)
    groups = [np.var(np.asarray(target)[np.asarray(hashed) == i]) for i in range(12)]
    np.testing.assert_allclose(confused, np.mean(groups), rtol=1e-2)  # the least it can reach
    assert composed < 0.1 * confused


def test_scale_of_large_vocabularies_survives_the_index_arithmetic():
    sizes = default_sizes(10_000_000, "mixed_radix")
    last = partition_indices(jnp.asarray([9_999_999]), sizes, "mixed_radix")
    assert [int(i[0]) for i in last] == list(numpy_tuple(9_999_999, sizes, "mixed_radix"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": [4, 4]}, "tell 16 categories apart, but there are 18"),
        ({"sizes": [4, 6], "partition": "chinese_remainder"}, "4 and 6 are not"),
        ({"sizes": [3, 3, 3], "width": 10, "operation": "concat"}, "does not divide"),
    ],
)
def test_partitions_that_are_not_complementary_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        build(**arguments)


def test_sizes_that_share_a_factor_do_collide():
    """Why they are refused: 12 | lcm(4, 6) categories are all that remainders tell apart."""
    tuples = [numpy_tuple(c, (4, 6), "chinese_remainder") for c in range(18)]
    pairs = itertools.combinations(tuples, 2)
    assert any(a == b for a, b in pairs)
