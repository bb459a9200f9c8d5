"""How a model is put together: rules fill slots, modules declare arrays, a context flows through.

A host builds its children through a `Scope`, which knows the module path and the config's rules.
Nothing is allocated: a `param` is a shape, a dtype and an initializer until `efficient.model.init`.
"""

import dataclasses
import difflib
import functools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient import registry
from efficient.errors import UserError, nearest
from efficient.parallel import megatron
from pallas_kernels.mesh import constrain

# What fills a slot that no rule speaks of.
DEFAULTS = {
    "mixer": "attention",
    "channel": "mlp",
    "linear": "dense",
    "norm": "rms_norm",
    "wiring": "pre_norm",
    "embedding": "table",
    "position": "no_position",
}
RULE_KEYS = ("at", "use", "kind")


class Buffer(nnx.Variable):
    """An array of state: kept in checkpoints, updated by steps, not moved by the optimizer."""


def param(shape: Sequence[int], init, dtype=jnp.float32, **metadata) -> nnx.Param:
    """Declares a trained array, which `init(key, shape, dtype)` will draw.

    Blocks are alike only where their initializers are equal, so `init` is a value of
    `efficient.init`, a dataclass of your own or a function of a module.

    Raises:
      UserError: `init` is a lambda, a closure or a partial, equal to nothing but itself.
    """
    return nnx.Param(_declared(shape, init, dtype), init_fn=init, **metadata)


def buffer(shape: Sequence[int], init, dtype=jnp.float32, **metadata) -> Buffer:
    """Declares an array of state: batch statistics, a mask, a power-iteration vector."""
    return Buffer(_declared(shape, init, dtype), init_fn=init, **metadata)


def _declared(shape: Sequence[int], init, dtype) -> jax.ShapeDtypeStruct:
    """Refuses an empty array, and an initializer that is made anew with every block and then
    equals none of the others."""
    if any(size < 1 for size in shape):
        raise UserError(f"an array would have the shape {tuple(shape)}; sizes must be 1 or more")
    named = "<" not in getattr(init, "__qualname__", "<")  # no <lambda>, nothing of <locals>
    if init is None or named or type(init).__eq__ is not object.__eq__:
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    raise UserError(
        f"the initializer {getattr(init, '__qualname__', type(init).__name__)!r} equals no other,"
        " so that blocks would never be stacked; take one of efficient.init, such as Normal(0.02)"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every module receives beside its input: `module(x, context)`.

    Attributes:
      positions: [B, T] int32 position of each token; None means 0, 1, 2, ...
      segment_ids: [B, T] int32; tokens see only their own segment; None means one segment.
      rng: a key derived from seed, step and layer; None where nothing may be random (evaluation).
      progress: float32 scalar, training step over total steps; techniques ramp on it.
      train: whether the model is being trained (static).
      grid: (height, width) of the tokens of an image (static), None for sequences.
      placement: the rules by which arrays lie on the mesh (static), `parallel.placement.Placement`;
        None where there is none.
      permuted: whether tokens lie in the order of `placement.sequence`, not by position (static).
      run_stack: (stack, x, context) -> (y, aux), called in place of a stack of blocks (static);
        pipelines cut a model there.
    """

    positions: Int[Array, "B T"] | None = None
    segment_ids: Int[Array, "B T"] | None = None
    rng: Array | None = None
    progress: Float[Array, ""] | float = 0.0
    train: bool = dataclasses.field(default=False, metadata={"static": True})
    grid: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    placement: Any = dataclasses.field(default=None, metadata={"static": True})
    permuted: bool = dataclasses.field(default=False, metadata={"static": True})
    run_stack: Any = dataclasses.field(default=None, metadata={"static": True})

    def place(self, x: Array, kind: str = "tokens", gradient: str | None = None) -> Array:
        """Keeps activations where the rules have them, so that it is parameters that travel.

        Args:
          kind: of `Placement.activation`.
          gradient: of the derivative, where that is to lie otherwise.
        """
        layouts = self.layout(kind, x.shape), self.layout(gradient or kind, x.shape)
        return x if None in layouts else _placed(layouts, x)

    def layout(self, kind: str, shape: tuple[int, ...]) -> jax.sharding.NamedSharding | None:
        """How activations of this kind and shape lie on the mesh; None on a single device."""
        if self.placement is None or self.placement.mesh.size == 1:
            return None
        return self.placement.activation(kind, shape)

    def rows(
        self, name: str, table: Float[Array, "V D"], tokens: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Rows of the table at `<name>/table`, for the embedding of that `scope.name`."""
        if self.placement is not None and jax.sharding.get_abstract_mesh().manual_axes:
            where = self.placement.gathered(f"{name}/table", table.shape)
            if where.spec and where.spec[0]:
                return megatron.lookup(table, tokens, where, self.layout("inputs", tokens.shape))
        return jnp.take(table, tokens, axis=0)

    def features(self, name: str) -> tuple[Any, Any]:
        """The mesh axes that split the inputs and outputs of the linear of that `scope.name`."""
        if self.placement is None:
            return None, None
        return self.placement.features(name.replace("*", "0"))

    def key(self, name: str) -> Array | None:
        """The key of one user of randomness in a layer; `scope.name` so that no two share it."""
        return None if self.rng is None else jax.random.fold_in(self.rng, zlib.crc32(name.encode()))

    def layer(self, index: Int[Array, ""] | int) -> "Context":
        """The context of layer `index`."""
        if self.rng is None:
            return self
        return dataclasses.replace(self, rng=jax.random.fold_in(self.rng, index))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _placed(layouts, x):
    """x in the first layout, its derivative in the second."""
    return constrain(x, layouts[0])


_placed.defvjp(
    lambda layouts, x: (_placed(layouts, x), None),
    lambda layouts, _, dx: (constrain(dx, layouts[1]),),
)


def call(module: nnx.Module, x: Array, context: Context) -> tuple[Array, dict[str, Array]]:
    """Calls a module that returns `y` or `(y, aux)`; always gives `(y, aux)`.

    `aux` maps names to scalars. A name that starts with `loss/` is added to the objective's loss,
    summed over layers; any other is reported as a metric, averaged over layers.
    """
    out = module(x, context)
    return out if isinstance(out, tuple) else (out, {})


@dataclasses.dataclass
class Rule:
    """`use` this technique with `arguments` wherever the whole path matches the pattern `at`."""

    at: str
    technique: registry.Technique
    arguments: dict[str, Any]
    where: str
    matched: bool = False
    other_kinds: set[str] = dataclasses.field(default_factory=set)

    @classmethod
    def parse(cls, entry: Mapping[str, Any], where: str) -> "Rule":
        if not isinstance(entry, Mapping):
            raise UserError(
                f"{where} must be {{'at': ..., 'use': ..., **arguments}}, not {entry!r}"
            )
        for key in ("at", "use"):
            if key not in entry:
                others = entry.keys() - set(RULE_KEYS)
                close = difflib.get_close_matches(key, others, n=1, cutoff=0.5)
                hint = f"; you wrote {close[0]!r}" if close else ""
                raise UserError(f"{where}: a rule needs 'at' and 'use'; {key!r} is missing{hint}")
            if not isinstance(entry[key], str):
                raise UserError(f"{where}: {key!r} must be a string, not {entry[key]!r}")
        try:
            re.compile(entry["at"])
        except re.error as error:
            raise UserError(f"{where}: '{entry['at']}' is no regular expression: {error}") from None
        try:
            technique = registry.find(entry["use"], entry.get("kind"))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        arguments = {k: v for k, v in entry.items() if k not in RULE_KEYS}
        registry.check_arguments(technique, arguments, where)
        return cls(entry["at"], technique, arguments, where)

    def fills(self, path: str, kind: str) -> bool:
        """Whether this rule speaks of the slot; remembers that it found something."""
        if not re.fullmatch(self.at, path):
            return False
        if self.technique.kind != kind:
            self.other_kinds.add(kind)
            return False
        self.matched = True
        return True


class Rules:
    """A config's ordered rules; the first that matches a slot fills it."""

    def __init__(self, entries: Sequence[Mapping[str, Any]] = ()):
        self.rules = [Rule.parse(e, f"config.rules[{i}]") for i, e in enumerate(entries)]
        self.paths: list[tuple[str, str]] = []  # every slot met: (path, kind)
        self.used: list[tuple[str, registry.Technique]] = []

    def resolve(self, path: str, kind: str) -> Rule | None:
        self.paths.append((path, kind))
        found = [rule for rule in self.rules if rule.fills(path, kind)]
        return found[0] if found else None

    def check_all_matched(self) -> None:
        """A rule that matches nothing is a mistake; says which paths there are."""
        for rule in self.rules:
            if rule.matched:
                continue
            kind = rule.technique.kind
            if rule.other_kinds:
                others = " and ".join(sorted(rule.other_kinds))
                raise UserError(
                    f"{rule.where}: '{rule.at}' matches only {others} slots,"
                    f" but {rule.technique.name!r} is a {kind}"
                )
            paths = sorted({re.sub(r"/\d+(?=/|$)", "/0", p) for p, k in self.paths if k == kind})
            hint = nearest(rule.at.replace(r"\d+", "0").replace(".*", "0"), paths)
            raise UserError(f"{rule.where}: '{rule.at}' matches no {kind} slot; {hint}")


def _check_declared(
    technique: registry.Technique, kind: str, host: Sequence[Any], grid: tuple[int, int] | None
) -> None:
    """Refuses a combination that the technique does not declare."""
    allowed = technique.declares.get("causal", (True, False))
    if kind == "mixer" and host[1] not in allowed:
        has, wants = ("causal", "is not") if host[1] else ("not causal", "is")
        raise UserError(
            f"the host is {has} and {technique.name!r} {wants}; use another mixer there"
        )
    if technique.declares.get("grid") and grid is None:
        raise UserError(
            f"{technique.name!r} needs an image's grid of tokens; use it in model.name=vision"
        )


class Scope:
    """A place in the model: its path and the rules that fill the slots below it.

    Attributes:
      grid: (height, width) of the tokens of an image there; None for sequences.
    """

    def __init__(
        self,
        rules: Rules,
        path: str = "",
        defaults: Mapping[str, Any] | None = None,
        grid: tuple[int, int] | None = None,
    ):
        self.rules = rules
        self.path = path
        self.grid = grid
        self._defaults = dict(defaults or {})

    @property
    def name(self) -> str:
        """The path with layer numbers left out; names this place's randomness (`Context.key`)."""
        return re.sub(r"\d+", "*", self.path)

    def at(self, name: str | int, defaults: Mapping[str, Any] | None = None) -> "Scope":
        """The scope of a child; `defaults` maps patterns under it to (technique, arguments)."""
        path = f"{self.path}/{name}" if self.path else str(name)
        inherited = dict(self._defaults)
        inherited.update({f"{re.escape(path)}/{at}": fill for at, fill in (defaults or {}).items()})
        return Scope(self.rules, path, inherited, self.grid)

    def on_grid(self, height: int, width: int) -> "Scope":
        """The same place, where tokens lie on a grid; a host says so before it fills slots."""
        return Scope(self.rules, self.path, self._defaults, (height, width))

    def fill(self, kind: str, name: str | int, *host, default=None, defaults=None) -> nnx.Module:
        """Builds the technique that fills the slot `name`.

        The first rule of the config that matches wins; then a pattern that a technique above has
        set for the slots it owns (`defaults`); then `default`, a name or a (name, arguments)
        pair; then the default of the kind.
        """
        scope = self.at(name, defaults)
        rule = self.rules.resolve(scope.path, kind)
        if rule is not None:
            technique, arguments, where = rule.technique, rule.arguments, rule.where
        else:
            wanted = default or DEFAULTS[kind]
            for at, fill in self._defaults.items():
                if re.fullmatch(at, scope.path):
                    wanted = fill
            technique_name, arguments = (wanted, {}) if isinstance(wanted, str) else wanted
            technique, where = registry.find(technique_name, kind), f"default of {scope.path}"
            registry.check_arguments(technique, arguments, where)
        try:
            _check_declared(technique, kind, host, scope.grid)
            self.rules.used.append((scope.path, technique))
            return technique.build(scope, *host, **arguments)
        except UserError as error:
            prefix = "" if " -> " in str(error) else f"{where}: {technique.name} -> {scope.path}: "
            raise UserError(f"{prefix}{error}") from None

    def mixer(self, name, width: int, causal: bool, **options) -> nnx.Module:
        """[B, T, D] -> [B, T, D] along the sequence."""
        return self.fill("mixer", name, width, causal, **options)

    def channel(self, name, width: int, **options) -> nnx.Module:
        """[B, T, D] -> [B, T, D], each token by itself."""
        return self.fill("channel", name, width, **options)

    def linear(self, name, in_features: int, out_features: int, use_bias=False, **options):
        """[..., I] -> [..., O]."""
        return self.fill("linear", name, in_features, out_features, use_bias, **options)

    def norm(self, name, width: int, **options) -> nnx.Module:
        """[..., D] -> [..., D]."""
        return self.fill("norm", name, width, **options)
