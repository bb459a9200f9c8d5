"""Softmax attention with grouped queries, rotary positions, windows and soft-capped logits.

Attention: Vaswani et al. 2017, arXiv 1706.03762. Grouped queries: Ainslie et al. 2023, arXiv
2305.13245. Rotary positions: Su et al. 2021, arXiv 2104.09864, in the half-split layout of GPT-NeoX
and Llama.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient.errors import UserError, nearest
from efficient.parallel.sequence import attend
from efficient.registry import register
from efficient.scope import Context, Scope
from pallas_kernels.attention import Causal, Full, Mask, Window, attention

KERNELS = ("reference", "blockwise", "tpu", "gpu")

QKV_NORM = (
    r"(q|k|v)_norm"  # norms after the projections, identity unless a rule or wiring fills them
)


def rotary(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B #T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x_i, x_{i + H/2}) by position * theta^(-2i/H), in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


@register("mixer", "attention", sequence=True)
class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H) + mask) v with N query heads and K key-value heads.

    A mixer that differs in which keys are seen is a subclass that sets `mask` when it is built, or
    overrides `mask_for` where the mask depends on the length.

    Args:
      heads: N; default one head of 64 features each.
      kv_heads: K, divides N; default N.
      head_size: H; default D / N.
      rope: base of the rotary frequencies, None for no rotary positions.
      window: each query sees keys at a distance below this; None for all.
      softcap: logits become softcap * tanh(logits / softcap); None for none.
      kernel: which implementation of `pallas_kernels.attention`, one of `KERNELS`; None is that of
        the platform. `reference` alone has forward-mode derivatives, and is what `step` runs.
      bias: biases on the four projections.
    """

    def __init__(
        self,
        scope: Scope,
        width: int,
        causal: bool,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_size: int | None = None,
        rope: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        kernel: str | None = None,
        bias: bool = False,
    ):
        for name, size in {"heads": heads, "kv_heads": kv_heads, "head_size": head_size}.items():
            if size is not None and size < 1:
                raise UserError(f"{name} must be 1 or more, got {size}")
        heads = heads or max(1, width // 64)
        kv_heads = kv_heads or heads
        if head_size is None and width % heads:
            raise UserError(f"width {width} does not divide into {heads} heads; set head_size")
        head_size = head_size or width // heads
        if heads % kv_heads:
            raise UserError(f"{heads} heads do not divide into {kv_heads} kv_heads")
        if rope is not None and head_size % 2:
            raise UserError(f"rope needs an even head_size, got {head_size}")
        if kernel not in (None, *KERNELS):
            raise UserError(f"kernel={kernel!r} is no implementation; {nearest(kernel, KERNELS)}")
        self.heads, self.kv_heads, self.head_size = heads, kv_heads, head_size
        self.window, self.softcap, self.rope, self.kernel = window, softcap, rope, kernel
        self.mask = Causal() if causal else Full()
        if window is not None:
            self.mask = Window(window, 0 if causal else window - 1)
        self.q = scope.linear("q", width, heads * head_size, bias)
        self.k = scope.linear("k", width, kv_heads * head_size, bias)
        self.v = scope.linear("v", width, kv_heads * head_size, bias)
        self.out = scope.linear("out", heads * head_size, width, bias)
        for name in ("q_norm", "k_norm", "v_norm"):
            setattr(self, name, scope.norm(name, head_size, default="identity"))

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T D"]:
        positions = context.positions
        if positions is None:
            positions = jnp.arange(x.shape[1])[None]
        q, k, v = self._project(x, positions, context)
        y = attend(
            q,
            k,
            v,
            context,
            mask=self.mask_for(x.shape[1]),
            softcap=self.softcap,
            implementation=self.kernel,
        )
        return self.out(y.reshape(*y.shape[:2], -1), context)

    def mask_for(self, length: int) -> Mask:
        """Which of `length` queries sees which of as many keys."""
        del length
        return self.mask

    def init_state(self, batch: int, length: int, dtype):
        """Empty key and value caches [B, length, K, H] and the number of tokens in them."""
        shape = (batch, length, self.kv_heads, self.head_size)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32)

    def step(self, x: Float[Array, "B 1 D"], state, context: Context):
        """Attends from one new token to the cache with that token added."""
        keys, values, index = state
        q, k, v = self._project(x, jnp.full((1, 1), index), context)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, k.astype(keys.dtype), index, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, v.astype(values.dtype), index, axis=1)
        y = self._attend_one(q, keys, values, jnp.arange(keys.shape[1]), index)
        return self.out(y, context), (keys, values, index + 1)

    def _attend_one(
        self,
        q: Float[Array, "B 1 N H"],
        keys: Float[Array, "B S K H"],
        values: Float[Array, "B S K H"],
        held: Int[Array, "S"] | Int[Array, "N S"],
        index: Int[Array, ""],
    ) -> Float[Array, "B 1 D"]:
        """The query at position `index` over cached keys at positions `held`, heads joined.

        Of the mask only its elements are asked; what lies after `index` is hidden in any case.
        By "reference" whatever `kernel` is: the T x S scores that it keeps are one row here, and
        the other implementations would fill a tile of queries with a single one.
        """
        mask = self.mask_for(keys.shape[1])
        head = jnp.arange(self.heads)[:, None] if mask.names_heads() else 0
        seen = (held <= index) & mask.element(head, index, held)
        y = attention(
            q,
            keys.astype(q.dtype),
            values.astype(q.dtype),
            bias=jnp.where(jnp.atleast_2d(seen), 0.0, -jnp.inf)[None, :, None],
            softcap=self.softcap,
            implementation="reference",
        )
        return y.reshape(*y.shape[:2], -1)

    def _project(self, x, positions, context):
        q, k, v = self._heads_of(x, context)
        if self.rope is not None:
            q, k = rotary(q, positions, self.rope), rotary(k, positions, self.rope)
        return q, k, v

    def _heads_of(self, x, context):
        batch, length, _ = x.shape
        q = self.q(x, context).reshape(batch, length, self.heads, self.head_size)
        k = self.k(x, context).reshape(batch, length, self.kv_heads, self.head_size)
        v = self.v(x, context).reshape(batch, length, self.kv_heads, self.head_size)
        return self.q_norm(q, context), self.k_norm(k, context), self.v_norm(v, context)
