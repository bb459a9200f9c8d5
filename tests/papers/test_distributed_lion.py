"""Distributed Lion: votes and steps against NumPy, bytes of the TPU program, what is refused."""

import collections
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from configs import common
from efficient import model as model_lib
from efficient.errors import UserError
from efficient.optimizers.distributed_lion import scale_by_votes
from efficient.scope import Context
from efficient.training import experiment
from efficient.training.plan import plan_config
from efficient.training.run import Run

B1, B2, RATE, DECAY = 0.9, 0.99, 0.01, 0.1


def numpy_step(x, momenta, grads, vote, decay):
    """(x, momenta) of one step by the equations, in the dtype of x; lists by replica."""
    signs = [
        np.where(B1 * m + (1 - B1) * g > 0, 1.0, -1.0) for m, g in zip(momenta, grads, strict=True)
    ]
    total = sum(signs)
    direction = np.where(total > 0, 1.0, -1.0) if vote == "majority" else total / len(signs)
    moved = [B2 * m + (1 - B2) * g for m, g in zip(momenta, grads, strict=True)]
    return x - RATE * (direction + decay * x), moved


@pytest.mark.parametrize("vote", ["majority", "average"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_steps_are_those_of_the_equations(count, vote):
    """Sizes that fill no byte, gradients of zero, and ties of even numbers of replicas."""
    rng = np.random.default_rng(count)
    shapes = {"a": (5, 7), "b": (3,), "c": ()}
    x = {p: rng.normal(size=s).astype(np.float32) for p, s in shapes.items()}
    momenta = {p: [np.zeros(s, np.float32)] * count for p, s in shapes.items()}
    optimizer = optax.chain(
        scale_by_votes(B1, B2, vote), optax.add_decayed_weights(DECAY), optax.scale(-RATE)
    )
    mesh = Mesh(jax.devices()[:count], "data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")),
        out_specs=(P("data"), P("data")), check_vma=False,
    )  # fmt: skip
    def step(x, state, grads):
        own, grads = (jax.tree.map(lambda a: a[0], tree) for tree in (state, grads))
        updates, own = optimizer.update(grads, own, x)
        return jax.tree.map(lambda a: a[None], (optax.apply_updates(x, updates), own))

    state = jax.tree.map(lambda a: jnp.stack([a] * count), optimizer.init(x))
    found = x
    for _ in range(4):
        grads = {p: rng.normal(size=(count, *s)).astype(np.float32) for p, s in shapes.items()}
        grads["b"][:, 0] = 0
        every, state = step(found, state, grads)
        for p in shapes:
            x[p], momenta[p] = numpy_step(x[p], momenta[p], list(grads[p]), vote, DECAY)
            for one in np.asarray(every[p]):  # every replica has the same
                np.testing.assert_array_equal(one, every[p][0])
            np.testing.assert_allclose(every[p][0], x[p], rtol=0, atol=1e-6)
            np.testing.assert_allclose(state[0].momentum[p], momenta[p], rtol=0, atol=1e-6)
        found = jax.tree.map(lambda a: a[0], every)
    assert np.abs(np.asarray(x["a"])).max() > 0


def test_one_replica_is_lion():
    rng = np.random.default_rng(0)
    x = {"a": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)}
    lion, ours = optax.scale_by_lion(B1, B2), scale_by_votes(B1, B2, "majority")
    states = lion.init(x), ours.init(x)
    for _ in range(3):
        grads = {"a": jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)}
        (expected, first), (found, second) = (
            o.update(grads, s) for o, s in zip((lion, ours), states, strict=True)
        )
        states = first, second
        np.testing.assert_array_equal(found["a"], expected["a"])
        assert set(np.unique(found["a"])) == {-1.0, 1.0}


# ---- the train step


def config(count, vote="majority", **fields):
    entry = {"name": "distributed_lion", "learning_rate": RATE, "vote": vote}
    phase = common.phase(4, optimizer=entry, clip=None)
    return tiny.config(phase, mesh={"data": count}, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_takes_these_steps_by_the_replicas_own_gradients(accumulate):
    count = 4
    run, state = tiny.start(config(count, accumulate=accumulate, batch_size=16), jax.devices()[:4])
    phase, first = run.phases[0], tiny.host(state)
    step = run.train_step(phase)
    x = {p.removeprefix("params/"): a for p, a in first.items() if p.startswith("params/")}
    momenta = {p: [np.zeros_like(a)] * count for p, a in x.items()}

    @jax.jit
    def gradient(x, batch):
        return jax.grad(
            lambda x: phase.objective(model_lib.bind(phase.stacked, x), batch, Context())[0]
        )(x)

    for batch in tiny.batches(run, 2):
        rows = tiny.host(batch)
        parts = [
            gradient(x, {n: a.reshape(count, -1, *a.shape[1:])[i] for n, a in rows.items()})
            for i in range(count)
        ]
        state, metrics = step(state, batch)
        found, most = tiny.host(state), 0.0
        for p in x:
            grads = [np.asarray(g[p]) for g in parts]
            sure = np.ones(x[p].shape, bool)  # signs that no rounding of a gradient turns
            for m, g in zip(momenta[p], grads, strict=True):
                sure &= np.abs(B1 * m + (1 - B1) * g) > 1e-6
            before = x[p]
            x[p], momenta[p] = numpy_step(x[p], momenta[p], grads, "majority", 0.0)
            np.testing.assert_allclose(found[f"params/{p}"][sure], x[p][sure], rtol=0, atol=1e-6)
            most = max(most, sure.mean())
            assert np.abs(found[f"params/{p}"] - before).max() == pytest.approx(RATE, rel=1e-3)
            x[p] = found[f"params/{p}"]
        assert most > 0.9
        assert np.isfinite(metrics["loss"]) and metrics["weight"] > 0
    kept = [a for p, a in found.items() if p.startswith("optimizer/") and "mixer/q/kernel" in p]
    assert kept and all(a.shape[0] == count for a in kept)
    assert any(np.abs(a[0] - a[1]).max() > 0 for a in kept)  # each has its own


SIXTEEN = 16


@pytest.mark.slow
@pytest.mark.parametrize("vote", ["majority", "average"])
def test_bytes_of_the_tpu_program(vote):
    """(N - 1) / N of n / 8 bytes each way, 8 times as many back for an average; no gradients."""
    pytest.importorskip("libtpu", reason="the TPU compiler; pip install -e .[lab]")
    found = config(SIXTEEN, vote, batch_size=SIXTEEN)
    found.model = {**found.model, "width": 512, "vocab_size": 1024}
    plan = plan_config(found, "v5e:4x4")
    sent = collections.Counter()
    for one in plan.collectives:
        sent[one.kind] += one.wire
    model, _ = experiment.build_model(found, {})
    kinds, shapes = model_lib.is_param(model), model_lib.abstract(model)
    parameters = sum(math.prod(s.shape) for p, s in shapes.items() if kinds[p])
    part = 1024 * math.ceil(parameters / 8 / 1024 / SIXTEEN)  # bits of a replica's, in whole KiB
    assert sent["all-to-all"] == part * (SIXTEEN - 1)
    assert sent["all-gather"] == part * (SIXTEEN - 1) * (1 if vote == "majority" else 8)
    others = sum(n for kind, n in sent.items() if kind not in ("all-to-all", "all-gather"))
    assert others < 0.01 * part


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mesh": {"data": 2, "tensor": 2}}, "no other; set config.mesh.tensor=1"),
        ({"mesh": {"data": 2, "fsdp": 2}}, "no other; set config.mesh.fsdp=1"),
    ],
)
def test_refused_before_it_compiles(change, words):
    found = config(2)
    for name, value in change.items():
        found[name] = value
    with pytest.raises(UserError, match=words):
        Run(found, jax.devices()[:4])


def test_an_unknown_vote_is_refused():
    with pytest.raises(UserError, match="vote='mean'"):
        Run(config(2, "mean"), jax.devices()[:2])
