"""Which query sees which key, described without a T x S array.

A mask is a small frozen, hashable object; masks are combined by `&` and `|`:

    Causal() & Window(4096)                    a causal sliding window
    Causal() & (Window(4096) | Sinks(4))       with attention sinks
    Causal() | Prefix(128)                     a prefix language model
    Causal(offset=S - T)                       T queries at the end of S keys
    Heads([Causal(), Causal() & Window(256)])  one mask a head

Query t and key s count from 0. Every mask gives

    element(head, t, s)  whether the query sees the key, on integer arrays that broadcast
    blocks(heads, T, S, block_q, block_kv)  EMPTY, PARTIAL or FULL, for each block of the scores

`blocks` works on the bounds of a block, so it costs as much as there are blocks. It may call a
block PARTIAL that is empty or full, where masks are combined, and is never wrong otherwise. Where
T or S is no multiple of a block, the last block is judged on the part that exists.
"""

import dataclasses
import functools

import numpy as np

EMPTY, PARTIAL, FULL = 0, 1, 2


class Mask:
    """What all masks share; see the module's docstring.

    movable: fields that `element` only adds and compares, so that they may be traced integers.
    """

    movable = ()

    def element(self, head, t, s):
        """Whether query t of a head sees key s.

        Args:
          head, t, s: integers, NumPy or JAX arrays that broadcast against each other.

        Returns:
          A boolean array which broadcasts against them (a mask that reads only s has s's shape).
        """
        raise NotImplementedError

    def check(self, heads: int, T: int, S: int) -> None:
        """Raises ValueError where the mask does not fit `heads` query heads, T queries, S keys."""

    def head(self, n: int) -> "Mask":
        """The mask of query head n, in which no head is named any more."""
        return self

    def names_heads(self) -> bool:
        """Whether heads may differ."""
        return False

    def blocks(self, heads: int, T: int, S: int, block_q: int, block_kv: int) -> np.ndarray:
        """uint8[1 | heads, ceil(T / block_q), ceil(S / block_kv)] of EMPTY, PARTIAL, FULL.

        One entry stands for all heads where the mask names none.
        """
        self.check(heads, T, S)
        tiles = _tiles(T, S, block_q, block_kv)
        if not self.names_heads():
            return self._judge(*tiles)[None]
        judge = functools.cache(lambda mask: mask._judge(*tiles))
        return np.stack([judge(self.head(n)) for n in range(heads)])

    def _judge(self, t_low, t_high, s_low, s_high):
        """uint8[Tb, Sb] for tiles of queries t_low..t_high [Tb, 1] and keys s_low..s_high [1, Sb].

        Bounds are inclusive. Only called on a mask that names no heads.
        """
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return _combine(And, self, other, neutral=Full(), absorbing=Empty())

    def __or__(self, other: "Mask") -> "Mask":
        return _combine(Or, self, other, neutral=Empty(), absorbing=Full())


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def element(self, head, t, s):
        return s == s

    def _judge(self, t_low, t_high, s_low, s_high):
        return _state(t_low == t_low, s_low != s_low)


@dataclasses.dataclass(frozen=True)
class Empty(Mask):
    """No query sees any key."""

    def element(self, head, t, s):
        return s != s

    def _judge(self, t_low, t_high, s_low, s_high):
        return _state(t_low != t_low, s_low == s_low)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """s <= t + offset."""

    offset: int = 0
    movable = ("offset",)

    def element(self, head, t, s):
        return s <= t + self.offset

    def check(self, heads, T, S):
        _check_integer("Causal", "offset", self.offset)

    def _judge(self, t_low, t_high, s_low, s_high):
        return _state(s_high <= t_low + self.offset, s_low > t_high + self.offset)


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """t + offset - left < s <= t + offset + right: `left` keys up to the query's own, and `right`.

    None for left or right leaves that side open. With block > 1 the same rule holds for the
    blocks (t + offset) // block and s // block: whole blocks are seen or not.
    """

    left: int | None
    right: int | None = 0
    offset: int = 0
    block: int = 1
    movable = ("left", "right", "offset")

    def element(self, head, t, s):
        t, s = _divide(t + self.offset, self.block), _divide(s, self.block)
        seen = s == s
        if self.left is not None:
            seen = seen & (s > t - self.left)
        if self.right is not None:
            seen = seen & (s <= t + self.right)
        return seen

    def check(self, heads, T, S):
        if self.left is not None:
            _check_integer("Window", "left", self.left, 1, "it counts the query's own key; or None")
        if self.right is not None:
            _check_integer("Window", "right", self.right, 0, "or None for no bound")
        _check_integer("Window", "offset", self.offset)
        _check_integer("Window", "block", self.block, 1)

    def _judge(self, t_low, t_high, s_low, s_high):
        t_low, t_high = ((t + self.offset) // self.block for t in (t_low, t_high))
        s_low, s_high = s_low // self.block, s_high // self.block
        full, empty = _state_arrays(t_low, s_low)
        if self.left is not None:
            full = full & (s_low > t_high - self.left)
            empty = empty | (s_high <= t_low - self.left)
        if self.right is not None:
            full = full & (s_high <= t_low + self.right)
            empty = empty | (s_low > t_high + self.right)
        return _state(full, empty)


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """s < n: the first n keys, seen by every query. `Causal() | Prefix(n)` is a prefix LM."""

    n: int
    movable = ("n",)

    def element(self, head, t, s):
        return s < self.n

    def check(self, heads, T, S):
        _check_integer(type(self).__name__, "n", self.n, 1)

    def _judge(self, t_low, t_high, s_low, s_high):
        like = t_low == t_low
        return _state((s_high < self.n) & like, (s_low >= self.n) & like)


@dataclasses.dataclass(frozen=True)
class Sinks(Prefix):
    """s < n: attention sinks, the first n keys. `Causal() & (Window(w) | Sinks(n))`.

    The same rule as Prefix under the name that the reader of a long-context model looks for.
    """


@dataclasses.dataclass(frozen=True)
class Stride(Mask):
    """(s // block + shift) % stride == 0: every stride-th block of keys, seen by every query."""

    stride: int
    shift: int = 0
    block: int = 1
    movable = ("shift",)

    def element(self, head, t, s):
        return _remainder(_divide(s, self.block) + self.shift, self.stride) == 0

    def check(self, heads, T, S):
        _check_integer("Stride", "stride", self.stride, 1)
        _check_integer("Stride", "shift", self.shift)
        _check_integer("Stride", "block", self.block, 1)

    def _judge(self, t_low, t_high, s_low, s_high):
        low, high = (s // self.block + self.shift for s in (s_low, s_high))
        live = high // self.stride - (low - 1) // self.stride
        like = t_low == t_low
        return _state((live == high - low + 1) & like, (live == 0) & like)


@dataclasses.dataclass(frozen=True)
class BlockPattern(Mask):
    """live[head, t // block[0], s // block[1]]: any pattern of blocks, shared or one a head.

    Args:
      live: bool[1 | N, ceil(T / block[0]), ceil(S / block[1])], or [Tb, Sb]. Kept (and printed)
        as one string a head, rows of 0 and 1 apart by spaces, which is accepted too.
      block: rows and columns of scores that one entry stands for.

    Inside a kernel use `residuals`, which leaves no table to read where the kernel's blocks lie
    within the pattern's.
    """

    live: tuple[str, ...]
    block: tuple[int, int]

    def __post_init__(self):
        object.__setattr__(self, "live", _pattern_strings(self.live))
        block = self.block if isinstance(self.block, (tuple, list)) else (self.block,) * 2
        object.__setattr__(self, "block", tuple(block))

    def table(self) -> np.ndarray:
        """live as bool[1 | N, Tb, Sb]."""
        return _pattern_table(self.live)

    def element(self, head, t, s):
        table = self.table()
        row = _clip(_divide(t, self.block[0]), table.shape[1])
        column = _clip(_divide(s, self.block[1]), table.shape[2])
        head = head if len(table) > 1 else head * 0
        if not all(isinstance(x, (int, np.integer, np.ndarray)) for x in (head, t, s)):
            import jax.numpy as jnp

            table = jnp.asarray(table)
        return table[head, row, column]

    def check(self, heads, T, S):
        if len(self.block) != 2:
            raise ValueError(f"BlockPattern: block must be (rows, columns), got {self.block}")
        for rows in self.block:
            _check_integer("BlockPattern", "block", rows, 1)
        need = (-(-T // self.block[0]), -(-S // self.block[1]))
        got = self.table().shape
        if got[0] not in (1, heads) or got[1:] != need:
            raise ValueError(
                f"BlockPattern: live has shape {got}, but {heads} heads, T {T}, S {S} and block "
                f"{self.block} need (1 or {heads}, {need[0]}, {need[1]})"
            )

    def head(self, n):
        return self if len(self.live) == 1 else BlockPattern((self.live[n],), self.block)

    def names_heads(self):
        return len(self.live) > 1

    def _judge(self, t_low, t_high, s_low, s_high):
        sums = np.pad(np.cumsum(np.cumsum(self.table()[0], 0, dtype=np.int64), 1), ((1, 0), (1, 0)))
        top, bottom = t_low // self.block[0], t_high // self.block[0] + 1
        left, right = s_low // self.block[1], s_high // self.block[1] + 1
        live = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return _state(live == (bottom - top) * (right - left), live == 0)


@dataclasses.dataclass(frozen=True)
class Heads(Mask):
    """masks[head]: one mask for each query head."""

    masks: tuple[Mask, ...]

    def __post_init__(self):
        object.__setattr__(self, "masks", tuple(self.masks))

    def element(self, head, t, s):
        if isinstance(head, (int, np.integer)):
            return self.masks[head].element(head, t, s)
        groups = {}
        for n, mask in enumerate(self.masks):
            groups.setdefault(skeleton(mask), []).append(n)
        seen = (head != head) & (t != t) & (s != s)
        for heads in groups.values():
            mask = _of_head([self.masks[n] for n in heads], heads, head)
            here = functools.reduce(lambda a, b: a | b, [head == n for n in heads])
            seen = seen | (here & mask.element(head, t, s))
        return seen

    def check(self, heads, T, S):
        if len(self.masks) != heads:
            raise ValueError(
                f"Heads: {len(self.masks)} masks for {heads} query heads; give {heads}"
            )
        for mask in dict.fromkeys(self.masks):
            mask.check(heads, T, S)

    def head(self, n):
        return self.masks[n].head(n)

    def names_heads(self):
        return True


@dataclasses.dataclass(frozen=True)
class And(Mask):
    """What all of `masks` allow; made by `&`."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        return f"({' & '.join(map(repr, self.masks))})"

    def element(self, head, t, s):
        return functools.reduce(lambda a, b: a & b, (m.element(head, t, s) for m in self.masks))

    def check(self, heads, T, S):
        for mask in self.masks:
            mask.check(heads, T, S)

    def head(self, n):
        return functools.reduce(lambda a, b: a & b, (mask.head(n) for mask in self.masks))

    def names_heads(self):
        return any(mask.names_heads() for mask in self.masks)

    def _judge(self, *tiles):
        return functools.reduce(np.minimum, (mask._judge(*tiles) for mask in self.masks))


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """What any of `masks` allows; made by `|`."""

    masks: tuple[Mask, ...]

    def __repr__(self):
        return f"({' | '.join(map(repr, self.masks))})"

    def element(self, head, t, s):
        return functools.reduce(lambda a, b: a | b, (m.element(head, t, s) for m in self.masks))

    check = And.check
    names_heads = And.names_heads

    def head(self, n):
        return functools.reduce(lambda a, b: a | b, (mask.head(n) for mask in self.masks))

    def _judge(self, *tiles):
        return functools.reduce(np.maximum, (mask._judge(*tiles) for mask in self.masks))


def _combine(kind, a, b, neutral, absorbing):
    """a & b or a | b, flat, without repetitions and without what changes nothing."""
    if not isinstance(b, Mask):
        return NotImplemented
    parts = []
    for mask in (a, b):
        parts += mask.masks if isinstance(mask, kind) else [mask]
    parts = [mask for mask in dict.fromkeys(parts) if mask != neutral]
    if absorbing in parts:
        return absorbing
    if not parts:
        return neutral
    return parts[0] if len(parts) == 1 else kind(tuple(parts))


def skeleton(mask: Mask):
    """A hashable that is alike for masks which differ in `movable` fields alone."""
    if isinstance(mask, (And, Or)):
        return type(mask), *map(skeleton, mask.masks)
    values = ((field.name, getattr(mask, field.name)) for field in dataclasses.fields(mask))
    return type(mask), *(x if x[0] not in mask.movable else x[1] is None for x in values)


def _of_head(alike, heads, head):
    """The mask of `head`, an array, of masks of one skeleton that belong to `heads`."""
    first = alike[0]
    if isinstance(first, (And, Or)):
        parts = zip(*(mask.masks for mask in alike))
        return type(first)(tuple(_of_head(part, heads, head) for part in parts))
    moved = {}
    for name in first.movable:
        base, *others = (getattr(mask, name) for mask in alike)
        steps = [(n, x - base) for n, x in zip(heads[1:], others) if x != base]
        if steps:
            moved[name] = base + sum((head == n) * step for n, step in steps)
    return dataclasses.replace(first, **moved) if moved else first


def _tiles(T, S, block_q, block_kv):
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        _check_integer("blocks", name, block, 1)
    t_low = np.arange(0, T, block_q)[:, None]
    s_low = np.arange(0, S, block_kv)[None, :]
    return t_low, np.minimum(t_low + block_q, T) - 1, s_low, np.minimum(s_low + block_kv, S) - 1


def _state_arrays(t, s):
    like = (t == t) & (s == s)
    return like, ~like


def _state(full, empty):
    full, empty = np.broadcast_arrays(full, empty)
    return np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)).astype(np.uint8)


def _divide(x, n):
    """Floor division, by a shift where that does: a TPU's vector unit has no division."""
    if n & (n - 1) == 0:
        return x >> (n.bit_length() - 1) if n > 1 else x
    if isinstance(x, (int, np.integer, np.ndarray)):
        return x // n
    import jax

    # Positions are above -2 ** 30. Pallas lowers division that truncates, and none that floors.
    more = 2**30 // n
    return jax.lax.div(x + more * n, jax.numpy.full_like(x, n)) - more


def _remainder(x, n):
    return x & (n - 1) if n & (n - 1) == 0 else x - n * _divide(x, n)


def _clip(index, size):
    if isinstance(index, (int, np.integer)):
        return min(max(int(index), 0), size - 1)
    return index.clip(0, size - 1)


def _check_integer(mask, name, value, least=None, remark=""):
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if integer and (least is None or value >= least):
        return
    accepted = "an integer" if least is None else f"an integer of at least {least}"
    remark = f" ({remark})" if remark else ""
    raise ValueError(f"{mask}: {name} must be {accepted}{remark}, got {value!r}")


def _pattern_strings(live):
    if isinstance(live, (list, tuple)) and live and all(isinstance(x, str) for x in live):
        live = [[[int(c) for c in row] for row in head.split()] for head in live]
    try:
        table = np.asarray(live)
    except ValueError:
        table = None
    table = table[None] if table is not None and table.ndim == 2 else table
    if table is None or table.ndim != 3 or not np.isin(table, (0, 1)).all() or not table.size:
        raise ValueError(
            "BlockPattern: live must be zeros and ones [heads or 1, T blocks, S blocks] "
            "or [T blocks, S blocks]"
        )
    rows = (table.astype(np.uint8) + ord("0")).tobytes().decode()
    height, width = table.shape[1:]
    rows = [rows[i : i + width] for i in range(0, len(rows), width)]
    return tuple(" ".join(rows[i : i + height]) for i in range(0, len(rows), height))


@functools.lru_cache(maxsize=64)
def _pattern_table(live):
    table = np.array([[[c == "1" for c in row] for row in head.split()] for head in live])
    table.setflags(write=False)
    return table
