"""Low-rank training: spectral initialization, both decays, the cut after a full-rank warm-up."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import low_rank_study as study_config
from efficient import model as model_lib
from efficient import registry
from efficient.errors import UserError
from efficient.linears.low_rank import LowRank
from efficient.optimizers.frobenius_adamw import frobenius_gradient
from efficient.scope import Context, Rules, Scope
from efficient.surgery.low_rank import DenseToLowRank
from models.decoder import Decoder

UP = "blocks/0-1/channel/up"
SHAPES = {
    f"{UP}/down": (2, 6, 3),
    f"{UP}/up": (2, 3, 9),
    "blocks/2/mixer/q/down": (5, 2),
    "blocks/2/mixer/q/up": (2, 4),
    "embed/table": (4, 3),
    "norm/scale": (4,),
}


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


def decay_mask(params):
    return {path: "scale" not in path for path in params}


def layer(in_features, out_features, rank, **arguments):
    return LowRank(Scope(Rules(), "q"), in_features, out_features, False, rank=rank, **arguments)


@pytest.mark.parametrize(("shape", "init_std"), [((96, 160), None), ((160, 96), 0.5)])
def test_spectral_initialization(shape, init_std):
    """The singular values of a Gaussian matrix, cut; balanced factors; other bases each time."""
    rank, std = 24, shape[0] ** -0.5 if init_std is None else init_std
    module = layer(*shape, rank, init="spectral", init_std=init_std)
    make = jax.jit(lambda key: model_lib.init(module, key))
    values = make(jax.random.key(0))
    down, up = (np.float64(values[n]) for n in ("down", "up"))
    gram = down.T @ down
    np.testing.assert_allclose(gram, up @ up.T, atol=1e-5 * gram.max())
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-5 * gram.max())
    drawn = np.random.default_rng(1).normal(size=(8, *shape)) * std
    wanted = np.linalg.svd(drawn, compute_uv=False).mean(axis=0)[:rank]
    found = np.linalg.svd(down @ up, compute_uv=False)
    np.testing.assert_allclose(found[:rank], wanted, rtol=0.04)
    assert found[rank] < 1e-5 * found[0]
    assert np.abs(make(jax.random.key(1))["down"] - down).max() > 0.1 * std


def test_spectral_ones_keeps_the_directions_alone():
    pair = [layer(40, 30, 8, init=init) for init in ("spectral", "spectral_ones")]
    both = [model_lib.init(module, jax.random.key(0)) for module in pair]
    for values in both[1:]:
        matrix = np.float64(values["down"]) @ np.float64(values["up"])
        singular = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(singular, [1.0] * 8 + [0.0] * 22, atol=1e-5)
    for name, axis in (("down", 0), ("up", 1)):
        unit = [v[name] / jnp.linalg.norm(v[name], axis=axis, keepdims=True) for v in both]
        np.testing.assert_allclose(*unit, atol=1e-5)


def test_frobenius_gradient():
    """Against differences of |D U|^2 / 2 in float64, entry by entry."""
    rng = np.random.default_rng(0)
    pair = [rng.normal(size=(5, 3)), rng.normal(size=(3, 4))]
    found = frobenius_gradient(*(jnp.asarray(a, jnp.float32) for a in pair))
    for which, gradient in enumerate(found):
        wanted = np.zeros_like(pair[which])
        for index in np.ndindex(*wanted.shape):
            norms = []
            for sign in (1, -1):
                moved = [a.copy() for a in pair]
                moved[which][index] += sign * 1e-5
                norms.append(0.5 * np.sum((moved[0] @ moved[1]) ** 2))
            wanted[index] = (norms[0] - norms[1]) / 2e-5
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_optimizer_against_a_loop():
    """AdamW on everything; factors lose D (U U^T) and (D^T D) U in place of themselves."""
    rates = {"weight_decay": 0.1, "frobenius_decay": 0.3, "b2": 0.99}
    transform = registry.find("frobenius_adamw", "optimizer").build(0.02, decay_mask, **rates)
    params, state, update = draw(0), transform.init(draw(0)), jax.jit(transform.update)
    grads = [draw(i + 1) for i in range(3)]
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    x = {path: a.astype(np.float64) for path, a in draw(0).items()}
    moments = dict.fromkeys(x, (0.0, 0.0))
    for t, g in enumerate(grads, start=1):
        decay = {"embed/table": 0.1 * x["embed/table"], "norm/scale": 0.0}
        for head in (UP, "blocks/2/mixer/q"):
            down, up = x[f"{head}/down"], x[f"{head}/up"]
            w = down @ up
            decay[f"{head}/down"] = 0.3 * w @ np.swapaxes(up, -1, -2)
            decay[f"{head}/up"] = 0.3 * np.swapaxes(down, -1, -2) @ w
        for path in x:
            own = g[path].astype(np.float64)
            m, v = (
                b * a + (1 - b) * n
                for a, b, n in zip(moments[path], (0.9, 0.99), (own, own**2), strict=True)
            )
            moments[path] = m, v
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            x[path] = x[path] - 0.02 * (step + decay[path])
    for path, wanted in x.items():
        np.testing.assert_allclose(params[path], wanted, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("factor_decay", [0.1, 0.4])
def test_decay_of_factors_alone(factor_decay):
    """AdamW's where both rates are equal; another rate changes the factors and nothing else."""
    rates = {"weight_decay": 0.1, "frobenius_decay": 0.0, "factor_decay": factor_decay}
    split = registry.find("frobenius_adamw", "optimizer").build(0.02, decay_mask, **rates)
    plain = registry.find("adamw", "optimizer").build(0.02, decay_mask, weight_decay=0.1)
    found, wanted = (
        jax.jit(t.update)(draw(1), t.init(draw(0)), draw(0))[0] for t in (split, plain)
    )
    for path, value in draw(0).items():
        more = (factor_decay - 0.1) * path.endswith(("/down", "/up"))
        np.testing.assert_allclose(found[path], wanted[path] - 0.02 * more * value, atol=1e-6)


def test_exempt_factors_are_left_alone():
    rates = {"frobenius_decay": 0.3}
    build = registry.find("frobenius_adamw", "optimizer").build
    zeros = {path: np.zeros_like(a) for path, a in draw(0).items()}
    exempt = build(0.02, lambda params: {p: "down" not in p for p in params}, **rates)
    updates, _ = exempt.update(zeros, exempt.init(draw(0)), draw(0))
    assert not any(np.any(updates[p]) for p in updates if p.endswith(("/down", "/up")))
    with pytest.raises(UserError, match="no trained layer has the factors"):
        plain = {"q/kernel": np.ones((3, 3), np.float32)}
        none = build(0.02, decay_mask)
        none.update(plain, none.init(plain), plain)


def test_what_the_decays_do_to_singular_values():
    """Least squares: weight decay subtracts from every singular value, Frobenius decay scales."""
    target = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    singular = np.linalg.svd(target, compute_uv=False)
    rate = float(singular[2])  # as much as the third

    def descend(decay):
        def step(pair, _):
            down, up = pair
            error = down @ up - target
            of_decay = decay(down, up)
            grads = error @ up.T + rate * of_decay[0], down.T @ error + rate * of_decay[1]
            return tuple(a - 0.02 * g for a, g in zip(pair, grads, strict=True)), None

        start = draw(1, {"down": (6, 5), "up": (5, 5)})
        pair, _ = jax.lax.scan(step, (0.3 * start["down"], 0.3 * start["up"]), None, 4000)
        return np.linalg.svd(np.float64(pair[0]) @ np.float64(pair[1]), compute_uv=False)

    kept = descend(frobenius_gradient)
    np.testing.assert_allclose(kept, singular / (1 + rate), rtol=2e-3)
    cut = descend(lambda down, up: (down, up))
    np.testing.assert_allclose(cut, np.maximum(singular - rate, 0), atol=0.05)
    assert cut[3] < 1e-3 < kept[4]


def decoder():
    rules = [
        {"at": ".*/mixer", "use": "attention", "heads": 2},
        {"at": r"blocks/.*/(up|down)", "use": "dense", "bias": True},
    ]
    return Decoder(Scope(Rules(rules)), vocab_size=11, width=8, depth=2, max_length=6)


def converted(rank, at=r"blocks/\d+/channel/(up|down)"):
    model = decoder()
    values = {
        p: 0.5 * a for p, a in draw(0, {p: v.shape for p, v in model_lib.walk(model)}).items()
    }
    surgery = DenseToLowRank(at=at, rank=rank)
    surgery.apply(model)
    arrays = {p: jnp.asarray(a) for p, a in values.items()}
    return values, model, surgery.convert(arrays, model, jax.random.key(0))


def test_warmed_up_layers_are_cut_to_the_nearest():
    values, model, new = converted(3)
    assert set(new) == set(model_lib.abstract(model))
    for name in ("up", "down"):
        path = f"blocks/1/channel/{name}"
        kernel = np.float64(values[f"{path}/kernel"])
        down, up = np.float64(new[f"{path}/down"]), np.float64(new[f"{path}/up"])
        tail = np.linalg.svd(kernel, compute_uv=False)[3:]
        np.testing.assert_allclose(np.sum((down @ up - kernel) ** 2), np.sum(tail**2), rtol=1e-4)
        np.testing.assert_allclose(down.T @ down, up @ up.T, atol=1e-4)
        np.testing.assert_array_equal(new[f"{path}/bias"], values[f"{path}/bias"])
    same = "blocks/0/mixer/q/kernel"
    np.testing.assert_array_equal(new[same], values[same])


def test_a_cut_at_full_rank_keeps_the_function():
    values, model, new = converted(8)
    tokens = {"tokens": jnp.asarray(np.random.default_rng(4).integers(0, 11, (2, 6)))}
    before = model_lib.bind(decoder(), {p: jnp.asarray(a) for p, a in values.items()})
    after = model_lib.bind(model, new)
    logits = before(tokens, Context())
    atol = 1e-4 * float(jnp.abs(logits).max())
    np.testing.assert_allclose(after(tokens, Context()), logits, atol=atol)


def test_bad_cuts_are_refused():
    with pytest.raises(UserError, match="rank=9 must be from 1 to 8"):
        converted(9)
    with pytest.raises(UserError, match="matches nothing"):
        converted(2, at="nowhere")


def test_config_has_one_argument_a_choice():
    base = study_config.get_config()
    assert base.rules[0]["init"] == "spectral" and len(base.phases) == 1
    assert base.phases[0]["optimizer"]["name"] == "frobenius_adamw"
    for decay in ("frobenius", "weight"):
        config = study_config.get_config(f"decay={decay},decay_rate=3")
        found = config.phases[0]["optimizer"]
        rates = {k: rate for k, rate in found.items() if k.endswith("_decay") and rate}
        assert rates == {"weight_decay": 0.1, study_config.DECAYS[decay]: 3.0}
    first, second = study_config.get_config("warmup=0.25,steps=400").phases
    assert (first["steps"], second["steps"]) == (100, 300)
    assert first["optimizer"]["name"] == "adamw" and second["surgery"][0]["rank"] == 48
    assert len(study_config.get_config("dense").phases) == 1
    for wrong in ("init=spectal", "decay=frob", "warmup=1.0", "init=normal,warmup=0.5"):
        with pytest.raises(UserError, match=wrong.split("=")[0]) as error:
            study_config.get_config(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("init", study_config.INITS)
def test_matrices_start_as_dense_ones(init):
    """The deviation of GPT-2's matrices, smaller in those that write to the residual stream."""
    config = study_config.get_config(f"init={init},share=0.5")
    found = {}
    for path in ("mixer/q", "mixer/out", "channel/up", "channel/down"):
        rule = next(r for r in config.rules if re.fullmatch(r["at"], f"blocks/0/{path}"))
        arguments = {k: v for k, v in rule.items() if k not in ("at", "use")}
        shape = {"channel/up": (192, 768), "channel/down": (768, 192)}.get(path, (192, 192))
        values = model_lib.init(LowRank(Scope(Rules(), path), *shape, False, **arguments),
                                jax.random.key(0))  # fmt: skip
        matrix = np.float64(values["down"]) @ np.float64(values["up"])
        std = {"out": 0.02 / 8**0.5, "down": 0.02 / 8**0.5}.get(path.split("/")[1], 0.02)
        found[path] = np.linalg.svd(matrix, compute_uv=False), std * np.sqrt(matrix.size)
    for path, (singular, norm) in found.items():
        if init == "normal":
            np.testing.assert_allclose(np.linalg.norm(singular), norm, rtol=0.05, err_msg=path)
        elif init == "spectral":
            # Half the singular values of a matrix of that norm: more than half of its square.
            assert 0.7 * norm < np.linalg.norm(singular) < norm, path
        else:
            np.testing.assert_allclose(singular[:96], 1.0, atol=1e-4, err_msg=path)
