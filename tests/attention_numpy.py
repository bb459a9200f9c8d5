"""Attention and its derivatives in NumPy, head by head, written out from the definition."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


class Exact:
    """float64, with NumPy's functions."""

    exp, tanh, log = staticmethod(np.exp), staticmethod(np.tanh), staticmethod(np.log)

    def keep(self, x):
        return np.asarray(x, np.float64)


class Naive:
    """Naive attention in a dtype: every array that it would keep is rounded to it.

    The softmax is in float32, with the platform's own exp, tanh and log, which are a little less
    exact than NumPy's.
    """

    exp, tanh, log = (
        staticmethod(lambda x, f=f: np.asarray(f(x))) for f in (jnp.exp, jnp.tanh, jnp.log)
    )

    def __init__(self, dtype):
        self.dtype = dtype

    def keep(self, x):
        return np.asarray(x, np.float32).astype(self.dtype).astype(np.float32)


def attention(
    q, k, v, dout, dlse, *, seen, scale, bias=None, alibi=None, offset=0, softcap=None, sinks=None,
    kept=None, rate=0.0, arithmetic=None,
):  # fmt: skip
    """All outputs and gradients of attention.

    Args:
      q, dout: [B, T, N, H]. k, v: [B, S, K, H]. dlse: [B, N, T].
      seen, kept: bool, broadcast to [B, N, T, S]. bias broadcasts to it too.
      arithmetic: Exact() or Naive(dtype).

    Returns:
      {"out", "lse", "dq", "dk", "dv", "dbias" [B, N, T, S], "dsinks" [N]}.
    """
    math = Exact() if arithmetic is None else arithmetic
    keep = math.keep
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    q, k, v, dout, dlse = (keep(x) for x in (q, k, v, dout, dlse))
    seen = np.broadcast_to(seen, (B, N, T, S))
    kept = np.broadcast_to(True if kept is None else kept, (B, N, T, S))
    bias = np.broadcast_to(0 if bias is None else bias, (B, N, T, S))
    found = {
        "out": np.zeros_like(q), "lse": np.zeros_like(dlse), "dq": np.zeros_like(q),
        "dk": np.zeros_like(k), "dv": np.zeros_like(v), "dbias": np.zeros((B, N, T, S)),
        "dsinks": np.zeros(N),
    }  # fmt: skip
    distance = np.abs(np.arange(T)[:, None] + offset - np.arange(S))
    for b, n in np.ndindex(B, N):
        some_k, some_v = k[b, :, n // (N // K)], v[b, :, n // (N // K)]
        raw = keep(q[b, :, n] @ some_k.T) * scale
        x = raw if softcap is None else softcap * math.tanh(raw / softcap)
        x = x + np.asarray(bias[b, n], x.dtype)
        x = x - (0 if alibi is None else np.asarray(alibi, x.dtype)[n]) * distance.astype(x.dtype)
        logits = [np.where(seen[b, n], x, -np.inf)]
        if sinks is not None:
            logits.append(np.full((T, 1), sinks[n], x.dtype))
        logits = np.concatenate(logits, 1)
        most = logits.max(1, keepdims=True)
        most = np.where(np.isinf(most), 0, most)
        e = math.exp(logits - most)
        total = e.sum(1, keepdims=True)
        with np.errstate(divide="ignore"):
            found["lse"][b, n] = (most + math.log(total))[:, 0]
        p = keep(e / np.where(total == 0, 1, total))
        sink, p = p[:, S:], p[:, :S]
        factor = (kept[b, n] / (1 - rate)).astype(p.dtype)
        found["out"][b, :, n] = keep(p * factor) @ some_v
        # d loss / d logits = p * (dp - sum(p * dp)) + p * dlse
        dp = keep(dout[b, :, n] @ some_v.T) * factor
        mean = (p * dp).sum(1, keepdims=True)
        both = dlse[b, n][:, None] - mean
        dx = keep(p * (dp + both))
        found["dsinks"][n] += (sink * both).sum()
        found["dbias"][b, n] = dx
        draw = dx if softcap is None else dx * (1 - math.tanh(raw / softcap) ** 2)
        draw = keep(draw) * scale
        found["dq"][b, :, n] = draw @ some_k
        found["dk"][b, :, n // (N // K)] += draw.T @ q[b, :, n]
        found["dv"][b, :, n // (N // K)] += keep(p * factor).T @ dout[b, :, n]
    return found


def check(found, expected, naive, dtype, what=""):
    """Error at most twice that of naive attention, and the rounding of the result; nothing missing.

    Beyond it, four last bits of float32: with one key left, naive attention's gradient is exact by
    cancellation, which no method that recomputes weights from the log-sum-exp has. Bits are those
    of the greatest value, or of the inputs, which are of unit size.
    """
    bits = 4 * float(np.finfo(np.float32).eps) + float(ml_dtypes.finfo(dtype).eps) / 2
    for name, value in found.items():
        value, right = np.asarray(value, np.float64), expected[name]
        assert value.shape == right.shape, f"{what} {name}: {value.shape} is not {right.shape}"
        np.testing.assert_array_equal(np.isinf(value), np.isinf(right), err_msg=f"{what} {name}")
        finite = np.isfinite(right)
        value, near, right = value[finite], np.asarray(naive[name])[finite], right[finite]
        error = np.abs(value - right).max(initial=0)
        allowed = 2 * np.abs(near - right).max(initial=0)
        allowed += bits * max(np.abs(right).max(initial=0), 1)
        assert error <= allowed, f"{what} {name}: error {error:.3g}, allowed {allowed:.3g}"


def check_learned_sinks(mask, sizes, dtype):
    """The public function with a learned logit a head, all outputs and gradients.

    Args:
      sizes: B, T, S, N, K, H.
    """
    from pallas_kernels.attention import attention as public

    B, T, S, N, K, H = sizes
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    q, k, v, dout = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    dlse = jnp.asarray(rng.normal(size=(B, N, T)), jnp.float32)
    sinks = jnp.asarray(np.linspace(-1, 4, N), jnp.float32)

    def attend(q, k, v, sinks):
        return public(q, k, v, sinks=sinks, mask=mask, return_lse=True)

    (out, lse), pull = jax.vjp(attend, q, k, v, sinks)
    dq, dk, dv, dsinks = pull((dout, dlse))
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}
    n, t, s = np.arange(N)[:, None, None], np.arange(T)[:, None], np.arange(S)
    seen = np.broadcast_to(mask.element(n, t, s), (B, N, T, S))
    given = [np.asarray(x) for x in (q, k, v, dout, dlse)]
    right, naive = (
        attention(*given, seen=seen, scale=H**-0.5, sinks=np.asarray(sinks), arithmetic=math)
        for math in (Exact(), Naive(dtype))
    )
    check(found, right, naive, dtype)
