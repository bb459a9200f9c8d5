"""Where structured products beat dense ones on TPUs, as the laboratory predicts it.

    python -m benchmarks.structured_predicted [OP ...] [--target v5e,v5p,v6e] [--case NAME]
        [--json PATH]

Compiles the cases of `monarch_matmul` and `butterfly_matmul` (or of other structured ops) with the
real compilers, forward and backward, and prints for each the predicted fraction of its own roofline
and how many times as fast it is as a dense product of the same size that runs at the roofline. No
dense product does, so that the second figure is a lower bound, and below 1 the dense one may win.
Nothing runs on a TPU.

The dense bound is the greater of FLOPs over the peak and bytes over the bandwidth, every array
moved once: forward 2 M I O, backward a product for dx and one for dW.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from benchmarks.records import record
from pallas_kernels.lab import __main__ as lab
from pallas_kernels.lab import ops
from pallas_kernels.lab.case import TPUS, Case, Program
from pallas_kernels.lab.chips import chip
from pallas_kernels.lab.row import Row
from pallas_kernels.lab.worker import Job, Workers

OPS = ("monarch_matmul", "butterfly_matmul")
ROLES = ("forward", "backward")


def dense_seconds(case: Case, role: str, target: str) -> float:
    """The least time of a dense product in place of the case's, in bfloat16."""
    x, *rest = case.args_of("forward")
    M, I = x.shape  # noqa: E741
    O = jax.eval_shape(Program.of(case.kernels["forward"]).fn, x, *rest).shape[-1]  # noqa: E741
    of = chip(target)
    once = max(2 * M * I * O / of.peak_flops, 2 * (M * I + I * O + M * O) / of.hbm_bandwidth)
    return once * (1 if role == "forward" else 2)


def summary(case: Case, role: str, target: str, rows: Sequence[Row]) -> dict:
    """One line: the role's kernels together.

    A backward pass for which the forward pass keeps something is compiled behind it, whose time is
    told apart, as "kept_forward_us".
    """
    found = {"op": rows[0].op, "case": case.name, "role": role, "target": target}
    reasons = [row.reason for row in rows if row.reason]
    if reasons:
        return found | {"reason": reasons[0]}
    before = [row for row in rows if role == "backward" and "_fwd" in row.kernel]
    rows = [row for row in rows if row not in before]
    predicted = sum(row.predicted_s for row in rows)
    least = sum(max(row.compute_s, row.memory_s) for row in rows)
    if role in case.flops and role in case.hbm_bytes:  # of the fewest products, and arrays once
        of = chip(target)
        least = max(case.flops[role] / of.peak_flops, case.hbm_bytes[role] / of.hbm_bandwidth)
    if before:
        found["kept_forward_us"] = sum(row.predicted_s for row in before) * 1e6
    return found | {
        "predicted_us": predicted * 1e6,
        "bound": "/".join(dict.fromkeys(row.bound for row in rows)),
        "roofline": least / predicted,
        "times_dense": dense_seconds(case, role, target) / predicted,
    }


def main(argv: list[str] | None = None) -> int:
    """Prints a line a case, role and chip; 1 where a kernel did not compile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured_predicted")
    parser.add_argument("op", nargs="*", default=OPS)
    parser.add_argument("--target", default=",".join(TPUS))
    parser.add_argument("--case", help="cases by name, with commas (all)")
    parser.add_argument("--json")
    options = parser.parse_args(argv)
    chosen = options.case.split(",") if options.case else None
    targets = options.target.split(",")
    if unknown := set(targets) - set(TPUS):
        parser.error(f"--target {min(unknown)}: of {', '.join(TPUS)}")
    work = [
        (op, case, role, target)
        for op in map(ops.find, options.op)
        for case in ops.load(op)
        if chosen is None or case.name in chosen
        for role in ROLES
        if role in case.kernels
        for target in targets
        if target in case.targets
    ]
    if not work:
        parser.error(f"--case {options.case}: no such case of {', '.join(options.op)}")
    lab.tpu.require()
    found = []
    with Workers() as workers:
        for op, case, role, target in work:
            rows = workers.run(Job(op.name, str(op.folder), case.name, role, target, ""))
            line = summary(case, role, target, rows)
            found.append(line)
            figures = line.get("reason") or (
                f"{line['predicted_us']:8.0f} us  {line['bound']:<9}"
                f" roofline {line['roofline']:.2f}  {line['times_dense']:6.2f} times dense"
            )
            if "kept_forward_us" in line:
                figures += f", behind a forward pass of {line['kept_forward_us']:.0f} us"
            print(f"{op.name:<18} {case.name:<22} {role:<9} {target}  {figures}", flush=True)
    if options.json:
        command = "python -m benchmarks.structured_predicted " + " ".join(options.op)
        record(options.json, command, rows=found)
    return 1 if any("reason" in line for line in found) else 0


if __name__ == "__main__":
    sys.exit(main())
