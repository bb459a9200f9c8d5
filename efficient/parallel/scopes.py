"""Parameters, gradients and optimizer state each choose over how many devices they are split.

"AMSP: Super-Scaling LLM Training via Advanced Model States Partitioning", Chen et al. 2023, arXiv
2311.00257, lets each of the three be replicated, split within a group of devices or split over all
of them, and searches for the layout that communicates least within a memory limit. "Rethinking
Memory and Communication Cost for Efficient Large Language Model Training" (PaRO), 2023, arXiv
2310.06003, groups the devices by how fast they are connected, and of such layouts takes those that
keep traffic within a group at the price of some redundancy. ZeRO 1, 2 and 3 (arXiv 1910.02054) and
MiCS (arXiv 2205.00119) are among them; see `LAYOUTS`.

Here a group is the mesh axis `fsdp` and there are as many groups as the axis `data` has devices.
`config.scopes` names a scope for each kind of array, and `parallel.placement` puts its axes where a
rule says `fsdp`. A step computes the update where the optimizer's state lies: parameters come from
their own scope to the optimizer's, which is a slice, and go back, which is a gather; gradients are
summed to their scope, or at once to the optimizer's where that is finer and no other microbatch is
waited for, so that ZeRO 1 and 2 differ with microbatches only. `parallel.scope_costs` has what a
layout costs, and the search:

    python -m efficient.parallel.scopes --parameters 7e9 --group 8 --groups 4 --memory 40

Of the papers their abstracts could be read, and of PaRO the first page. Which layouts the authors
leave out and by what formulas they weigh memory and traffic could not be established; the formulas
here follow from the collectives.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from efficient.errors import UserError, nearest
from efficient.papers import Claim, Paper

KINDS = ("parameters", "gradients", "optimizer")
# The mesh axes that a scope puts in the place of `fsdp`; each scope has those of the one before.
AXES = {"replicated": (), "group": ("fsdp",), "global": ("fsdp", "data")}
ORDER = tuple(AXES)
GATHER = ("compiler", "block")
# Linears that are split in their second dimension by default, and the embedding table. XLA for TPUs
# reduce-scatters along an array's last dimension by an all-reduce, twice the bytes: with
# gather="block" a placement rule that splits the first one halves them. It is no default: where the
# compiler gathers, it saves nothing (0.66 GiB a step of GPT-2 124M on v5e:4x4 either way), and
# a vocabulary of odd size would stay whole.
FIRST_DIMENSION = {
    "at": r".*/(out|down)(/base)?/kernel|embed/table",
    "spec": [["tensor", "fsdp"], None],
}


@dataclasses.dataclass(frozen=True)
class Scopes:
    """Over which devices parameters, gradients and optimizer state are split.

    Attributes:
      parameters: the scope of the float32 master weights and of other arrays of the model.
      gradients: of the gradients, and of their sums over microbatches.
      optimizer: of the optimizer's moments and of a moving average of the parameters.
      gather: who gathers parameters: the `compiler`, for each product, or each `block` as it
        begins; see `parallel.gathering`.
    """

    parameters: str = "group"
    gradients: str = "group"
    optimizer: str = "group"
    gather: str = "compiler"

    def __post_init__(self):
        for kind in KINDS:
            scope = getattr(self, kind)
            if scope not in ORDER:
                hint = nearest(str(scope), ORDER)
                raise UserError(f"config.scopes.{kind}={scope!r} is no scope; {hint}")
        if self.gather not in GATHER:
            hint = nearest(str(self.gather), GATHER)
            raise UserError(f"config.scopes.gather={self.gather!r} is unknown; {hint}")
        if ORDER.index(self.optimizer) < ORDER.index(self.parameters):
            raise UserError(
                f"config.scopes.optimizer={self.optimizer!r} is coarser than"
                f" parameters={self.parameters!r}, which would have to be gathered to be updated;"
                f" set optimizer={self.parameters!r}"
            )

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> "Scopes":
        fields = (*KINDS, "gather")
        for name in entry:
            if name not in fields:
                raise UserError(f"config.scopes has no field {name!r}; {nearest(name, fields)}")
        return cls(**entry)

    def to_config(self) -> dict[str, str]:
        """The value of `config.scopes`."""
        return dataclasses.asdict(self)

    @property
    def reduced(self) -> str:
        """The scope to which the gradients of a whole batch are summed."""
        return max(self.gradients, self.optimizer, key=ORDER.index)

    @property
    def finest(self) -> tuple[str, ...]:
        """The mesh axes of the finest scope in use."""
        return AXES[max((getattr(self, kind) for kind in KINDS), key=ORDER.index)]


DEFAULT = Scopes()
LAYOUTS = {
    "replicated": Scopes("replicated", "replicated", "replicated"),
    "zero_1": Scopes("replicated", "replicated", "global"),
    "zero_2": Scopes("replicated", "global", "global"),
    "zero_3": Scopes("global", "global", "global"),
    "mics": DEFAULT,
}


def scoped(spec: Sequence[Any], scope: str) -> list[Any]:
    """The spec of a placement rule with the axes of a scope in the place of `fsdp`."""
    axes = [a for a in AXES[scope] if a == "fsdp" or a not in axes_of(spec)]
    found = []
    for entry in spec:
        split = [b for a in axes_of((entry,)) for b in (axes if a == "fsdp" else [a])]
        found.append(split[0] if len(split) == 1 else tuple(split) or None)
    return found


def axes_of(spec: Sequence[Any]) -> list[str]:
    """The mesh axes that a spec names."""
    flat = []
    for entry in spec:
        flat.extend(entry if isinstance(entry, tuple) else [entry])
    return [axis for axis in flat if axis is not None]


_AMSP, _PARO = "tests/papers/test_amsp.py", "tests/papers/test_paro.py"
_READ = "the abstract; the paper itself could not be read"
_MASTERS = (
    "the float32 master weights are the parameters and have their scope, so that optimizer and"
    " parameters exchange 4 bytes a parameter"
)
PAPERS = (
    Paper(
        slug="amsp",
        status="equations",
        claims=(
            Claim(
                "parameters, gradients and optimizer states choose their scopes independently, and"
                " a step stays what it is on one device",
                f"{_AMSP}::test_a_layout_takes_the_steps_of_one_device",
                True,
                "ZeRO 1, 2 and 3, MiCS and two mixed layouts on eight devices, float32",
            ),
            Claim(
                "a search finds the layout of least traffic within a memory limit",
                f"{_AMSP}::test_the_search_is_the_best_of_all_layouts",
                True,
            ),
            Claim(
                "what model states take of memory",
                f"{_AMSP}::test_states_take_the_memory_of_the_formula",
                True,
                "parameters and optimizer state in the program that the TPU compiler makes for 16"
                " chips; of gradients only how their sums over microbatches are split",
            ),
            Claim(
                "what a layout communicates",
                f"{_AMSP}::test_collectives_are_those_of_the_formula",
                True,
                "in that program too, to the byte, with gather='block'; but the gradient of the"
                " embedding table is an all-reduce in every layout",
            ),
            Claim("90.3% scaling efficiency on 1024 GPUs", note="needs a cluster"),
        ),
        source=_READ,
        departures=(
            _MASTERS,
            "traffic and computation are overlapped as XLA does it, and not in the cost model",
            "the optimizer may not be split over fewer devices than the parameters",
        ),
    ),
    Paper(
        slug="paro",
        status="equations",
        claims=(
            Claim(
                "partial redundancy trades memory for traffic between groups",
                f"{_PARO}::test_redundancy_buys_traffic_between_groups",
                True,
                "bytes of the compiled program for 16 chips, four groups of four",
            ),
            Claim(
                "sums and gathers over all devices are made within groups and between them in turn",
                f"{_PARO}::test_each_collective_stays_within_groups_or_between_them",
                True,
                "in that program",
            ),
            Claim("1.19 to 2.50 times the throughput of other layouts", note="needs a cluster"),
            Claim(
                "a hierarchical overlapping ring is 36.5% more efficient than a ring",
                note="how a collective travels is XLA's and the network's",
            ),
        ),
        source="abstract and first page; the sections on layouts could not be read",
        departures=(
            _MASTERS,
            "the hierarchical overlapping ring is not implemented",
            "with gather='compiler' XLA chooses the collectives, and for global scopes its"
            " all-reduces cross all devices at once",
        ),
    ),
)

if __name__ == "__main__":
    from efficient.parallel.scope_costs import main

    main()
