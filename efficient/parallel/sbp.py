"""OneFlow's SBP: which collective each boundary of a placement needs, and which are not legal.

"OneFlow: Redesign the Distributed Deep Learning Framework from Scratch", Yuan, Li, Cheng, Liu, Guo,
Cai, Yao, Yang, Yi, Wu, Zhang and Zhao 2021, arXiv 2110.15032. Along each axis of a mesh a tensor is

    S(i)             split along dimension i
    B                whole on every device (broadcast)
    P(sum), P(max)   of the same shape on every device, the sum or maximum of which it is (partial)

and an operator has a list of legal signatures, those with which its parts need nothing of another
device. Of Y = X W along one axis, and along several any product of them:

    X      W      Y                     X      W      Y
    S(0)   B      S(0)                  P      B      P
    B      S(1)   S(1)                  B      P      P
    S(1)   S(0)   P(sum)                B      B      B

Here the list follows from the letters of an operator's dimensions (`sbp_ops.legal`): a letter of
the output splits it, one that is summed over gives parts of a sum. Where a tensor is not as its
consumer wants it a boxing stands between (`sbp_boxing` has the table of bytes). `explain` finds the
legal signatures that send least, one mesh axis after the other, and says what each boundary does
and why.

    python -m efficient.parallel.sbp --config=configs/llama_7b.py --mesh data=4,tensor=4

prints this for embedding, first block, head and cross-entropy of a decoder, forward, whose
parameters and activations lie as the config's placement says. The backward pass mirrors it: the
gradient of B is P and of P is B, so that an all-gather becomes a reduce-scatter.
"""

import argparse
import collections
import importlib.util
import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from efficient.cli import human, main_guard, text_table
from efficient.errors import UserError, nearest
from efficient.papers import Claim, Paper
from efficient.parallel.sbp_explain import Boundary, Explanation, explain
from efficient.parallel.sbp_ops import (
    B,
    Op,
    P,
    Program,
    Rule,
    S,
    Sbp,
    Signature,
    check,
    legal,
    parse,
    show,
)

__all__ = [
    "B",
    "Boundary",
    "Explanation",
    "Op",
    "P",
    "Program",
    "Rule",
    "S",
    "Sbp",
    "Signature",
    "check",
    "explain",
    "legal",
    "parse",
    "show",
]

_TEST = "tests/papers/test_oneflow_sbp.py"
PAPER = Paper(
    slug="oneflow_sbp",
    status="equations",
    claims=(
        Claim(
            "an operator has legal signatures: those of a matrix product, and their products along"
            " several mesh axes",
            f"{_TEST}::test_signatures_of_a_matrix_product",
            True,
        ),
        Claim(
            "boxings and their volumes",
            f"{_TEST}::test_bytes_of_boxings",
            True,
            "counted where simulated devices exchange arrays",
        ),
        Claim(
            "programs of legal signatures and boxings compute what one device does",
            f"{_TEST}::test_programs_on_simulated_devices",
            True,
            "random programs on one and two mesh axes",
        ),
        Claim(
            "the signatures chosen are those of least communication",
            f"{_TEST}::test_the_search_finds_the_least",
            True,
            "against all combinations of small programs on one and two axes",
        ),
        Claim(
            "model parallelism in the manner of Megatron needs no code but signatures",
            f"{_TEST}::test_megatron",
            True,
            "two all-reduces a block, or as many all-gathers and reduce-scatters; compiled programs"
            " agree in test_a_compiled_program_has_these_collectives",
        ),
        Claim("faster than the frameworks compared", note="needs GPUs and those frameworks"),
        Claim("actors with counters and credits schedule the runtime", note="XLA schedules here"),
    ),
    source="abstract; github.com/Oneflow-Inc/oneflow: user/ops/matmul_op.cpp (signatures),"
    " core/framework/sbp_infer_util.cpp (bytes); its documentation on SBP. The paper's own tables"
    " were out of reach",
    departures=(
        "signatures of operators follow from dimension letters and are not listed one by one",
        "the search is over a whole program, one mesh axis after the other, until none can be"
        " improved alone",
        "P(max) beside P(sum), not P(min)",
        "producer and consumer are on the same devices",
        "a boxing along several axes goes one axis at a time",
        "it explains placements and does not carry them out: XLA's partitioner does",
    ),
)


def report(found: Explanation, depth: int, everything: bool = False) -> str:
    """A table of the boundaries, then a line for each mesh axis.

    Args:
      found: of a program of `sbp_model.decoder_program`.
      depth: how many blocks there are, of which the program holds the first.
      everything: also what moves no bytes.
    """
    shown = found.boundaries if everything else found.collectives
    rows = [
        (
            b.op,
            b.tensor,
            b.axis,
            show(b.before),
            show(b.after),
            b.collective,
            human(b.payload),
            human(b.bytes),
            b.reason,
        )
        for b in shown
    ]
    header = ("wanted by", "tensor", "axis", "from", "to", "boxing", "whole", "sent", "why")
    lines = [
        "Signatures along " + ", ".join(f"{a}={n}" for a, n in found.mesh.items()),
        "whole: bytes that the devices along the axis hold together; sent: by each device",
        "",
        text_table(header, rows, right="whole, sent") if rows else "nothing is sent",
        "",
        *_totals(found.collectives, depth),
    ]
    return "\n".join(lines)


def _totals(sent: Sequence[Boundary], depth: int) -> list[str]:
    lines, forward = [], 0.0
    for axis in dict.fromkeys(b.axis for b in sent):
        here = [b for b in sent if b.axis == axis]
        block = [b for b in here if b.op.startswith("blocks/")]
        rest = [b for b in here if not b.op.startswith("blocks/")]
        total = depth * sum(b.bytes for b in block) + sum(b.bytes for b in rest)
        forward += total
        lines.append(
            f"{axis}={here[0].devices}: a block {_counted(block)}; embedding and head"
            f" {_counted(rest)}; {depth} blocks {human(total)} bytes a device"
        )
    return [*lines, f"all axes: {human(forward)} bytes a device forward"]


def _counted(sent: Sequence[Boundary]) -> str:
    """`2 all-reduce, 3.22G bytes`."""
    kinds = collections.Counter(b.collective for b in sent)
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    return f"{counts}, {human(sum(b.bytes for b in sent))} bytes" if sent else "nothing"


def mesh_sizes(text: str) -> dict[str, int]:
    """ "data=4,tensor=4" -> {"data": 4, "tensor": 4}."""
    sizes: dict[str, int] = {}
    for item in text.split(","):
        axis, _, size = item.strip().partition("=")
        if not size.isdecimal() or int(size) < 1 or axis in sizes:
            raise UserError(
                f"--mesh {text}: write each axis once with its devices, data=4,tensor=4"
            )
        sizes[axis] = int(size)
    return sizes


def load_config(text: str):
    """The config of `configs/x.py:argument`."""
    name, _, argument = text.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        known = [p.as_posix() for p in pathlib.Path("configs").glob("[!_]*.py")]
        raise UserError(f"no config file {name!r}; {nearest(name, known)}")
    spec = importlib.util.spec_from_file_location("_sbp_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{name} has no get_config(arg), so that it is no config")
    return module.get_config(argument or None)


def explain_config(config, sizes: dict[str, int]) -> tuple[Explanation, int]:
    """What the placement of a config needs on a mesh, and how many blocks its model has."""
    from efficient import data as data_lib
    from efficient.parallel import redco
    from efficient.parallel.mesh import make_mesh
    from efficient.parallel.placement import Placement
    from efficient.parallel.sbp_model import Device, decoder_program, mesh_axes
    from efficient.parallel.scopes import Scopes
    from efficient.training import experiment

    devices = np.array([Device(i) for i in range(math.prod(sizes.values()))], dtype=object)
    mesh, facts = make_mesh(sizes, devices), {}
    if config.model.get("vocab_size") is None:
        facts = data_lib.make_source(split="train", **config.data).facts
    model, _ = experiment.build_model(config, facts)
    rules = redco.expand(config.placement, model, mesh.shape)
    placement = Placement.parse(mesh, rules, scopes=Scopes.parse(config.scopes))
    length = config.data.get("length") or config.model.get("max_length", 1)
    itemsize = np.dtype(experiment.compute_dtype(config)).itemsize
    batch = config.batch_size // config.accumulate
    program, placements = decoder_program(model, placement, batch, length, itemsize)
    return explain(program, placements, mesh_axes(placement)), len(model.blocks)


@main_guard
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m efficient.parallel.sbp",
        description="The collectives that a config's placement needs, and why.",
    )
    parser.add_argument("--config", required=True, help="configs/x.py:argument, of a decoder")
    parser.add_argument("--mesh", required=True, help="axes and devices, data=4,tensor=4")
    parser.add_argument("--all", action="store_true", help="also slices, which send nothing")
    options = parser.parse_args(arguments)
    found, depth = explain_config(load_config(options.config), mesh_sizes(options.mesh))
    print(report(found, depth, options.all))


if __name__ == "__main__":
    sys.exit(main())
