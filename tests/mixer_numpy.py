"""A causal or other attention mixer in float64 NumPy, key by key, from what each query sees."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient import model as model_lib
from efficient.scope import Context, Rules, Scope


def build(name, width=16, causal=True, **arguments):
    """The mixer `name` alone."""
    return Scope(Rules([{"at": "mixer", "use": name, **arguments}])).mixer("mixer", width, causal)


def draw(module, seed=0, scale=0.5):
    """Random float64 values of every array."""
    rng = np.random.default_rng(seed)
    return {p: scale * rng.normal(size=s.shape) for p, s in model_lib.abstract(module).items()}


def run(module, values, x):
    """The mixer's output in float32."""
    arrays = {p: jnp.asarray(a, jnp.float32) for p, a in values.items()}
    return model_lib.bind(module, arrays)(jnp.asarray(x, jnp.float32), Context())


def numpy_mixer(x, v, heads, kv_heads, seen, distance=None, theta=None):
    """x [B, T, D] -> [B, T, D].

    Args:
      v: kernels of q, k, v and out.
      seen: (head, t, s) -> bool.
      distance: (t, s) -> how far apart the rotation takes them to be; default t - s.
      theta: base of the rotary frequencies; None for no positions. Features i and i + H / 2 are one
        complex number; the score of two is the real part of q conj(k) e^(i distance frequency).
    """
    distance = distance or (lambda t, s: t - s)
    B, T, _ = x.shape
    q = (x @ v["q/kernel"]).reshape(B, T, heads, -1)
    k, value = ((x @ v[f"{n}/kernel"]).reshape(B, T, kv_heads, -1) for n in "kv")
    H = q.shape[-1]
    out = np.zeros_like(q)
    for b, n, t in np.ndindex(B, heads, T):
        keys = [s for s in range(T) if seen(n, t, s)]
        some_k, group = k[b, keys, n // (heads // kv_heads)], n // (heads // kv_heads)
        scores = some_k @ q[b, t, n]
        if theta is not None:
            complex_q = q[b, t, n, : H // 2] + 1j * q[b, t, n, H // 2 :]
            complex_k = some_k[:, : H // 2] + 1j * some_k[:, H // 2 :]
            frequency = theta ** (-np.arange(H // 2) / (H // 2))
            apart = np.array([distance(t, s) for s in keys])[:, None]
            turned = np.exp(1j * apart * frequency)
            scores = (complex_q * complex_k.conj() * turned).real.sum(1)
        e = np.exp((scores - scores.max()) / np.sqrt(H))
        out[b, t, n] = e @ value[b, keys, group] / e.sum()
    return out.reshape(B, T, -1) @ v["out/kernel"]


def check_values_and_gradients(module, reference, x):
    """The mixer against `reference(x, values)`, and its gradients against its finite differences.

    Each array's gradient is compared along one random direction.
    """
    values = draw(module)
    expected = reference(x, values)
    weights = np.random.default_rng(7).normal(size=expected.shape)

    @jax.jit
    def both(values, x):
        y, back = jax.vjp(lambda values, x: run(module, values, x), values, x)
        return y, *back(jnp.asarray(weights, y.dtype))

    found, of_values, of_x = both(*jax.tree.map(jnp.float32, (values, x)))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * scale)
    rng, step = np.random.default_rng(8), 1e-6
    for path, grad in {**of_values, "x": of_x}.items():
        direction = rng.normal(size=grad.shape)
        sides = []
        for move in (step * direction, -step * direction):
            moved = {**values, "x": x}
            moved[path] = moved[path] + move
            sides.append(np.sum(reference(moved.pop("x"), moved) * weights))
        np.testing.assert_allclose(
            np.sum(np.asarray(grad, np.float64) * direction),
            (sides[0] - sides[1]) / (2 * step),
            rtol=1e-4,
            atol=1e-5 * np.linalg.norm(grad) * np.linalg.norm(direction),
            err_msg=path,
        )


def inputs(length, width=16, batch=1, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, length, width))
