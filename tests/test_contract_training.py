"""What objectives, optimizers and schedules must keep. A technique joins by a row.

Surgeries have `test_contract_surgery.py`; what fills a slot of a host, `test_contracts.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import models
from configs import common
from efficient import model as model_lib
from efficient import registry
from efficient.parallel.mesh import make_mesh
from efficient.parallel.placement import Placement
from efficient.scope import Context, Rules, Scope
from efficient.training.run import Run, Scoring, flatten, unflatten
from efficient.training.step import cast

B, T, V, D = 8, 6, 24, 16  # batch, length, vocabulary or classes, width
HEADS = [{"at": "head", "use": "matryoshka_heads", "first": 4}]

# name: (host, rules before the host's own, arguments)
OBJECTIVES: dict[str, tuple[str, list, dict]] = {
    "next_token": ("decoder", [], {"z_loss": 0.1}),
    "mini_sequence_loss": ("decoder", [], {"pieces": 4, "z_loss": 0.1}),
    "distillation": ("taught", [], {"weight": 0.5}),
    "classification": ("vision", [], {"label_smoothing": 0.1}),
    "multi_sample_dropout": ("vision", [], {"samples": 3}),
    "matryoshka": ("vision", HEADS, {"first": 4}),
    "regression": ("network", [], {}),
    "contrastive": ("dual_encoder", [], {}),
}
# What arrays of a low-rank layer and of a singular value decomposition are called.
FACTORS = {"blocks/0-2/mixer/q/down": (3, 8, 4), "blocks/0-2/mixer/q/up": (3, 4, 16)}
SVD = {
    f"blocks/0-2/mixer/q/{n}": (3, *s) for n, s in {"u": (8, 8), "s": (8,), "v": (16, 8)}.items()
}
# name: (arguments beside the learning rate, arrays beside `SHAPES`)
OPTIMIZERS: dict[str, tuple[dict, dict]] = {
    "adam": ({}, {}),
    "adamw": ({"nesterov": True}, {}),
    "distributed_lion": ({}, {}),
    "frobenius_adamw": ({}, FACTORS),
    "gwnlp": ({"rank": 6, "period": 5, "eps": 1e-3}, {}),  # eps well above rounding: see its file
    "gwt_adam": ({"eps": 0.1}, {}),  # where an approximation is near zero its details jump
    "lamb": ({}, {}),
    "lion": ({}, {}),
    "muon": ({}, {}),
    "sgd": ({"momentum": 0.9}, {}),
    "sst_adam": ({"rank": 3, "interval": 4, "warmup": 1}, SVD),
}
# name: arguments
SELECTIONS: dict[str, dict] = {"data_diet": {"keep": 0.25, "score": "random"}}
QUICK = ("adamw",)  # what `make test` checks of the others is little less
# name: arguments of a run of any number of steps
SCHEDULES: dict[str, dict] = {
    "constant": {"value": 0.5},
    "cosine": {"peak": 0.5, "final": 0.1},
    "linear": {"peak": 0.5, "final": 0.1},
    "lr_range_test": {"high": 0.5},
    "one_cycle": {"peak": 0.5},
    "one_cycle_momentum": {},
    "wsd": {"peak": 0.5, "shape": "linear"},
}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("objective", OBJECTIVES),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("selection", SELECTIONS),
    ],
)
def test_every_technique_has_a_row(kind, rows):
    names = {t.name for t in registry.techniques(kind) if not t.name.startswith("test_")}
    assert names == set(rows), f"give each {kind} a row here, and take stale ones out"


# Objectives


class Loss:
    """An objective on a small host, its arrays, and a batch."""

    def __init__(self, name: str):
        host, rules, arguments = OBJECTIVES[name]
        technique = registry.find(name, "objective")
        registry.check_arguments(technique, arguments, name)
        self.objective, generator = technique.build(**arguments), np.random.default_rng(0)
        self.coupled = technique.declares.get("coupled", False)
        if host in ("decoder", "taught"):
            rules = Rules([*rules, *common.gpt2(D, 1, 2)])
            sizes = {"vocab_size": V, "width": D, "depth": 1, "max_length": T}
            tokens = generator.integers(V, size=(B, T + 1))
            batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        elif host == "network":
            rules, sizes = Rules(rules), {"in_features": 4, "out_features": D, "parameters": 3}
            shapes = {"data": (B, 4), "parameters": (B, 3), "target": (B, D)}
            batch = {n: generator.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        else:
            rules = Rules([*rules, {"at": ".*/mixer", "use": "attention", "heads": 2}])
            stages = [{"width": D, "depth": 1, "kernel": 2, "stride": 2}]
            sizes = {"image_size": 4, "channels": 1, "stages": stages}
            batch = {"image": generator.random((B, 4, 4, 1), np.float32)}
            if host == "vision":
                sizes["num_classes"] = V
                batch["label"] = generator.integers(V, size=B)
            else:
                text = {"width": D, "depth": 1}
                sizes |= {"vocab_size": V, "max_length": T, "text": text, "embedding": D}
                batch["tokens"] = generator.integers(V, size=(B, T))
        self.model = models.host("decoder" if host == "taught" else host)(Scope(rules), **sizes)
        if host == "taught":  # by a teacher with values of its own
            registry.find("companion", "surgery").build().apply(self.model)
        rules.check_all_matched()
        self.arrays = model_lib.init(self.model, jax.random.key(0))
        self.batch = jax.tree.map(jnp.asarray, batch)

    @functools.cached_property
    def jitted(self):
        """(arrays, batch) -> (loss, metrics), as in evaluation."""

        def run(arrays, batch):
            return self.objective(model_lib.bind(self.model, arrays), batch, Context())

        return jax.jit(run)

    @functools.cached_property
    def grad(self):
        """(arrays, batch) -> ((loss, metrics), gradients), as in training."""

        def run(arrays, batch):
            context = Context(rng=jax.random.key(1), progress=0.5, train=True)
            return self.objective(model_lib.bind(self.model, arrays), batch, context)

        return jax.jit(jax.value_and_grad(run, has_aux=True))


@pytest.fixture(scope="module", params=OBJECTIVES)
def loss(request):
    return Loss(request.param)


def test_an_objective_trains_the_whole_model_and_reports(loss):
    (value, metrics), grads = loss.grad(loss.arrays, loss.batch)
    assert np.isfinite(value) and value > 0
    for path, grad in grads.items():
        assert np.isfinite(grad).all(), path
        assert (np.abs(grad).max() > 0) == model_lib.is_param(loss.model)[path], path
    assert {"loss", "weight"} <= set(metrics)
    for name, metric in metrics.items():
        assert metric.shape == () and metric.dtype == jnp.float32 and np.isfinite(metric), name
    per_example = T if "targets" in loss.batch else 1
    assert metrics["weight"] == B * per_example
    # what a model that knows nothing gets: log V, log B of pairs, or the targets' mean square
    ignorant = np.square(loss.batch["target"]).mean() if "target" in loss.batch else np.log(V)
    ignorant = np.log(B) if loss.coupled else ignorant
    assert 0.5 * ignorant < metrics["loss"] < 2 * ignorant


def test_rows_that_weigh_nothing_count_for_nothing(loss):
    """The last batch of an evaluation is filled up with rows of weight 0."""
    real = B - 3
    value, metrics = loss.jitted(loss.arrays, {n: a[:real] for n, a in loss.batch.items()})
    weight = (jnp.arange(B) < real).astype(jnp.float32)
    padded, padded_metrics = loss.jitted(loss.arrays, loss.batch | {"weight": weight})
    np.testing.assert_allclose(padded, value, rtol=1e-5)
    assert set(padded_metrics) == set(metrics)
    for name in metrics:
        np.testing.assert_allclose(padded_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    assert abs(float(loss.jitted(loss.arrays, loss.batch)[0] - value)) > 1e-4


def test_means_of_parts_by_their_weights_are_those_of_the_whole(loss):
    """Gradient accumulation and evaluation rely on it; the parts weigh unequally.

    One that declares `coupled` is refused with accumulation, and its loss does depend on the rest.
    """
    value, metrics = loss.jitted(loss.arrays, loss.batch)
    parts = [
        loss.jitted(loss.arrays, {n: a[rows] for n, a in loss.batch.items()})
        for rows in (slice(0, 2), slice(2, B))
    ]
    weights = np.array([part[1]["weight"] for part in parts])
    assert weights.sum() == metrics["weight"] and weights[0] != weights[1]
    if loss.coupled:
        mean = np.dot([part[0] for part in parts], weights) / weights.sum()
        assert abs(mean - value) > 0.1
        return
    for name in set(metrics) - {"weight"}:
        mean = np.dot([part[1][name] for part in parts], weights) / weights.sum()
        np.testing.assert_allclose(mean, metrics[name], rtol=1e-5, err_msg=name)
    mean = np.dot([part[0] for part in parts], weights) / weights.sum()
    np.testing.assert_allclose(mean, value, rtol=1e-5)


@pytest.mark.slow
def test_an_objective_on_eight_devices_equals_one(loss):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    (value, _), grads = loss.grad(loss.arrays, loss.batch)
    (other, _), others = loss.grad(
        jax.device_put(loss.arrays, everywhere), jax.device_put(loss.batch, spread)
    )
    np.testing.assert_allclose(other, value, rtol=2e-6)
    for path, grad in grads.items():
        # that of the keys' bias is zero but for rounding
        atol = 2e-5 * float(jnp.abs(grad).max()) + 1e-8
        np.testing.assert_allclose(others[path], grad, rtol=0, atol=atol, err_msg=path)


@pytest.mark.slow
def test_an_objective_in_bfloat16_stays_near(loss):
    value, _ = loss.jitted(loss.arrays, loss.batch)
    half, metrics = loss.jitted(cast(loss.arrays, jnp.bfloat16), loss.batch)
    # A rounding moves each logit by some 2^-8 of its size, which is of order one.
    assert abs(float(half - value)) < 0.02 * float(value)
    assert metrics["loss"].dtype == jnp.float32


# Optimizers

SHAPES = {
    "blocks/0-2/channel/up/kernel": (3, 8, 16),
    "blocks/3/channel/up/kernel": (8, 16),
    "blocks/3/mixer_norm/scale": (16,),
    "embed/table": (24, 8),
}
SPARED = "blocks/3/mixer_norm/scale"


def build(name: str, learning_rate=0.01, **arguments) -> optax.GradientTransformation:
    technique, arguments = registry.find(name, "optimizer"), OPTIMIZERS[name][0] | arguments
    registry.check_arguments(technique, arguments, name)

    def decay_mask(params):
        return {path: path != SPARED for path in params}

    return technique.build(learning_rate, decay_mask, **arguments)


def draw(name: str, seed: int, *, gradient=False) -> dict[str, jax.Array]:
    """Arrays at random; those of an SVD are orthonormal and positive, but for their gradients."""
    rng = np.random.default_rng(seed)
    drawn = {p: rng.normal(size=s) for p, s in {**SHAPES, **OPTIMIZERS[name][1]}.items()}
    if not gradient:
        drawn |= {p: np.abs(a) for p, a in drawn.items() if p.endswith("/s")}
        drawn |= {p: np.linalg.qr(a)[0] for p, a in drawn.items() if p.endswith(("/u", "/v"))}
    return {p: jnp.asarray(a, jnp.float32) for p, a in drawn.items()}


def steps(optimizer, params, gradient, count: int):
    """(parameters after each of `count` steps along `gradient(params, number)`, last state)."""

    @jax.jit
    def step(params, state, number):
        updates, state = optimizer.update(gradient(params, number), state, params)
        return optax.apply_updates(params, updates), state

    state, found = optimizer.init(params), []
    for number in range(count):
        params, state = step(params, state, number)
        found.append(params)
    return found, state


def fixed_gradients(name: str, count: int):
    """Gradients that do not depend on the parameters, one set a step."""
    drawn = [draw(name, 100 + i, gradient=True) for i in range(count)]
    return lambda params, number: jax.tree.map(lambda *a: jnp.stack(a)[number], *drawn)


NO_DECAY = ("adam", "distributed_lion")
SOME = [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in OPTIMIZERS]


@pytest.mark.parametrize("name", SOME)
def test_an_optimizer_comes_nearer_to_a_minimum(name):
    aim, start = draw(name, 1), draw(name, 2)
    (*_, found), state = steps(
        build(name, 0.03), start, lambda params, _: jax.tree.map(jnp.subtract, params, aim), 90
    )
    for path in SHAPES:
        before, after = (float(jnp.linalg.norm(x[path] - aim[path])) for x in (start, found))
        assert after < 0.8 * before, path
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def check_near(found, expected, start) -> None:
    """To the rounding of a float32 step, times a thousand for ratios to moments that are small."""
    assert set(found) == set(expected)
    for path, value in expected.items():
        moved = float(jnp.abs(value - start[path]).max())
        assert moved > 1e-4, path
        error = float(jnp.abs(found[path] - value).max())
        assert error <= 1e-4 * moved + 1e-6, (path, error, moved)


@pytest.mark.parametrize("name", SOME)
def test_stacked_layers_move_as_each_would_alone(name):
    def split(arrays):
        alone = {p: a for p, a in arrays.items() if "/0-2/" not in p}
        stacked = arrays.keys() - alone
        return alone | {p.replace("0-2", str(i)): arrays[p][i] for p in stacked for i in range(3)}

    gradient, params = fixed_gradients(name, 7), draw(name, 2)
    (*_, together), _ = steps(build(name), params, gradient, 7)
    (*_, apart), _ = steps(build(name), split(params), lambda p, n: split(gradient(p, n)), 7)
    check_near(split(together), apart, split(params))


# Adam decays nothing, and one bit of Distributed Lion's says no zero.
@pytest.mark.parametrize("name", [p for p in SOME if p.values[0] not in NO_DECAY])
def test_decay_shrinks_what_the_mask_names_and_spares_the_rest(name):
    params = draw(name, 2)
    (found,), _ = steps(
        build(name, weight_decay=0.1),
        params,
        lambda params, _: jax.tree.map(jnp.zeros_like, params),
        1,
    )
    for path, value in params.items():
        if path == SPARED:
            np.testing.assert_array_equal(found[path], value)
        elif not path.endswith(("/u", "/v")):  # which stay of length one
            assert jnp.linalg.norm(found[path]) < jnp.linalg.norm(value), path


@pytest.mark.parametrize("name", SOME)
def test_a_schedule_may_stand_for_the_learning_rate(name):
    params, gradient = draw(name, 2), fixed_gradients(name, 3)
    rates = jnp.array([0.02, 0.0, 0.02])
    (first, second, third), _ = steps(build(name, lambda step: rates[step]), params, gradient, 3)
    (expected,), _ = steps(build(name, 0.02), params, gradient, 1)
    check_near(first, expected, params)
    for path in params:
        np.testing.assert_allclose(second[path], first[path], rtol=0, atol=1e-6, err_msg=path)
        assert np.abs(third[path] - second[path]).max() > 1e-4, path


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_on_a_mesh_equals_one_device(name):
    params, gradient = draw(name, 2), fixed_gradients(name, 3)
    (*_, expected), _ = steps(build(name), params, gradient, 3)
    placement = Placement(make_mesh({"fsdp": 4, "tensor": 2}))
    where = {p: placement.sharding(p, a.shape) for p, a in params.items()}
    (*_, found), _ = steps(build(name), jax.device_put(params, where), gradient, 3)
    check_near(found, expected, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_is_arrays_that_a_checkpoint_can_name(name):
    state = jax.eval_shape(build(name).init, draw(name, 2))
    named = flatten(state)
    assert len(named) == len(jax.tree.leaves(state))
    assert all(leaf.dtype.kind in "fiub" for leaf in named.values()), named
    assert jax.tree.structure(unflatten(state, named)) == jax.tree.structure(state)


# Schedules


@pytest.mark.parametrize("total", [1, 2, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_finite_traced_or_not_and_no_larger_than_its_peak(name, total):
    technique = registry.find(name, "schedule")
    registry.check_arguments(technique, SCHEDULES[name], name)
    schedule = technique.build(total, **SCHEDULES[name])
    at = np.arange(total + 1)
    traced = np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(at)))
    np.testing.assert_allclose([schedule(int(step)) for step in at], traced, rtol=1e-6)
    most = max(v for v in (1e-9, *SCHEDULES[name].values()) if not isinstance(v, str))
    most = 1.0 if name == "one_cycle_momentum" else most
    assert np.isfinite(traced).all() and (traced >= 0).all() and traced.max() <= most * (1 + 1e-6)
    assert traced.max() > 0 or total == 1


# Selections


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_of_the_examples_and_a_function_of_its_key(name):
    technique = registry.find(name, "selection")
    registry.check_arguments(technique, SELECTIONS[name], name)
    run = Run(tiny.config(common.phase(1), batch_size=8))

    def chosen(seed: int) -> np.ndarray:
        key, phase = jax.random.key(seed), run.phases[0]
        scoring = Scoring(phase, {}, phase.objective, run.train_source, 8, key)
        return np.asarray(technique.build(**SELECTIONS[name])(scoring))

    kept = chosen(0)
    assert 0 < len(kept) < len(run.train_source)
    assert (np.diff(kept) > 0).all()  # in order, none twice
    assert kept[0] >= 0 and kept[-1] < len(run.train_source)
    np.testing.assert_array_equal(chosen(0), kept)
    assert not np.array_equal(chosen(1), kept)
