"""What linears make four devices send that share one block: collectives of a v5e's program.

    python -m benchmarks.tensor_parallel [--only "NAME;..."] [--json PATH]

A train step of a decoder of one block of width 2048, 16 sequences of 1024 tokens, on a mesh of
tensor=4, all linears of the block of one technique; compiled for v5e:2x2 in bfloat16, nothing is
run. Bytes are those one chip sends, in units of the block's activations [B, T, D]. A vocabulary's
embedding and head are part of the model, and the same in every row.
"""

import argparse
import collections
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from benchmarks.records import record
from configs import common
from efficient.training.plan import plan_config

WIDTH, LENGTH, BATCH = 2048, 1024, 16
LINEARS = {
    "dense": {},
    "low_rank": {"rank": WIDTH // 8},
    "monarch": {"blocks": 8},
    "monarch, split=features": {"blocks": 8, "split": "features"},
    "pixelfly": {"density": 0.25, "block": 128},
    "block_sparse": {"density": 0.25, "block": 128},
    "block_diagonal": {"blocks": 8},
    "butterfly": {"block": 128, "pad": True},
    "tensor_train": {"rank": 32},
}


def config(name: str):
    """The model with a technique and its arguments, or with dense layers."""
    rule = {"use": name.split(",")[0], "bias": True, **LINEARS[name]}
    rules = [{"at": r"blocks/\d+/(mixer|channel)/.*", **rule}]
    found = common.defaults()
    sizes = {"width": WIDTH, "depth": 1, "max_length": LENGTH, "tied": True}
    found.model = {"name": "decoder", **sizes}
    found.rules = [*rules, *common.gpt2(WIDTH, 1, 16)]
    found.data = {"name": "copying", "length": LENGTH, "num_tokens": 8}
    found.batch_size, found.compute_dtype = BATCH, "bfloat16"
    found.mesh.update({"data": 1, "tensor": 4})
    found.phases = [common.phase(1)]
    return found


def sent(name: str) -> dict[str, float]:
    """Kind of collective -> bytes a chip sends in a step, in activations of the block."""
    found = collections.Counter()
    for one in plan_config(config(name), "v5e:2x2").collectives:
        found[one.kind] += one.wire / (2 * BATCH * LENGTH * WIDTH)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(LINEARS))
    parser.add_argument("--json")
    given = parser.parse_args()
    for name in given.only:
        if name not in LINEARS:
            parser.error(f"no case {name!r}; there are {'; '.join(LINEARS)}")
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")
    print(f"| | {' | '.join(kinds)} | others | sum |\n|---|{'---|' * (len(kinds) + 2)}")
    results = {}
    for name in given.only:
        found = results[name] = sent(name)
        others = sum(size for kind, size in found.items() if kind not in kinds)
        row = [*(found.get(kind, 0.0) for kind in kinds), others, sum(found.values())]
        print(f"| {name} | {' | '.join(f'{size:.2f}' for size in row)} |", flush=True)
    if given.json:
        record(given.json, "python -m benchmarks.tensor_parallel", activations=results)


if __name__ == "__main__":
    main()
