"""The form of an op's `cases.py`: shapes that tests, laboratory and benchmarks share.

`cases.py` in the op's folder defines `CASES`, a list of `Case`. This is a whole one:

    import jax, jax.numpy as jnp
    from pallas_kernels.lab import Case
    from my_op.tpu import double                   # fn(x) that calls pl.pallas_call

    N = 8192 * 1024
    CASES = [
        Case(
            name="8k",
            kernels={"forward": double},
            args=(jax.ShapeDtypeStruct((8192, 1024), jnp.float32),),
            flops={"forward": N},
            hbm_bytes={"forward": 2 * 4 * N},
        )
    ]
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TPUS = ("v5e", "v5p", "v6e")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of a case's `args`, with what its text does not show. A plain function does too.

    Attributes:
      fn: called with `args`.
      label: what was chosen, such as block sizes; printed beside the kernel's name.
      from_vectors: what scalars that the vector units hand over (a maximum that a branch asks for)
        are taken to be when the kernels' branches are followed (`lab.scalar`); where it is None
        both sides of such a branch are charged. Name it where other values are exceptions.
      live_steps: part of a kernel's name -> grid steps of it that do work, of the given args; the
        others are taken to cost the loop without its largest region. A kernel that is not named
        does work in every step. Not asked for where all branches are known; nor is the next.
      inner_runs: part of a kernel's name -> how often the bodies of the loops inside its grid loop
        run in a grid step, on average, of the given args: by depth, as for
        `Schedule.with_inner_runs`. Where it is not said, a loop runs in every step, to its end:
        name kernels whose inner loops are for exceptions.
      rename: part of a kernel's name -> what to put in its place, where the name alone does not
        say which work it does.
    """

    fn: Callable
    label: str = ""
    from_vectors: int | None = None
    live_steps: Callable[..., Mapping[str, int]] | None = None
    inner_runs: Callable[..., Mapping[str, Sequence[float]]] | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __call__(self, *args):
        return self.fn(*args)

    @classmethod
    def of(cls, fn: "Callable | Program") -> "Program":
        return fn if isinstance(fn, cls) else cls(fn)

    def name_of(self, kernel: str) -> str:
        """The name under which the kernel is reported."""
        for old, new in self.rename.items():
            kernel = kernel.replace(old, new)
        return kernel

    def live_steps_of(self, kernel: str, args: tuple[Any, ...]) -> int | None:
        """Steps of the kernel named `kernel` that do work; None where all of them do."""
        return None if self.live_steps is None else _lookup(self.live_steps(*args), "", kernel)

    def inner_runs_of(self, kernel: str, args: tuple[Any, ...]) -> Sequence[float] | None:
        """Runs of the inner loops of the kernel named `kernel`; None where the program is mute."""
        return None if self.inner_runs is None else _lookup(self.inner_runs(*args), "", kernel)


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of an op with the programs to compile at it.

    Attributes:
      name: of the shape, for `--case`.
      kernels: role -> function of `args`, or a `Program`. A role is one program, such as "forward"
        or "backward"; a row is printed for each Pallas kernel in it.
      args: pytrees of `jax.ShapeDtypeStruct`; or role -> such a tuple where roles differ.
      flops: useful FLOPs by formula. The key is a role; in a program of several Pallas kernels, a
        part of the kernel's name ("dq", "dkv"): the longest that fits is taken before the role.
      hbm_bytes: bytes that have to cross HBM, by formula, with the same keys.
      peers: role -> peer -> functions of `args` to report the fastest of; see `lab.peers`, whose
        `megablox` no case of this package names: it is for grouped products of your own.
      targets: chips it is meant for: "v5e", "v5p", "v6e", "h200".
    """

    name: str
    kernels: Mapping[str, Callable]
    args: tuple[Any, ...] | Mapping[str, tuple[Any, ...]]
    flops: Mapping[str, float]
    hbm_bytes: Mapping[str, float]
    peers: Mapping[str, Mapping[str, Sequence[Callable]]] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = TPUS

    def __post_init__(self):
        unknown = set(self.peers) - set(self.kernels)
        if unknown:
            raise ValueError(
                f"case {self.name!r}: peers of no kernel: {', '.join(sorted(unknown))}"
            )

    def args_of(self, role: str) -> tuple[Any, ...]:
        return self.args[role] if isinstance(self.args, Mapping) else tuple(self.args)

    def flops_of(self, role: str, kernel: str) -> float | None:
        """Useful FLOPs of the Pallas kernel named `kernel`; None where the case does not say."""
        return _lookup(self.flops, role, kernel)

    def hbm_bytes_of(self, role: str, kernel: str) -> float | None:
        """HBM bytes of the Pallas kernel named `kernel`; None where the case does not say."""
        return _lookup(self.hbm_bytes, role, kernel)


def _lookup(table: Mapping[str, Any], role: str, kernel: str) -> Any:
    parts = [key for key in table if key in kernel]
    return table[max(parts, key=len)] if parts else table.get(role)
