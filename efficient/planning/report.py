"""A `Plan` as text for a terminal."""

import dataclasses

from efficient.planning.collectives import Collective
from efficient.planning.roofline import NOT_COUNTED

_WIDTH = 100
PREDICTION = "PREDICTION of a step, not a measurement: peak rates, no latency of kernels or host"


def to_text(plan) -> str:
    lines = [*_head(plan), "", *_memory(plan), "", *_flops(plan)]
    if plan.collectives:
        lines += ["", *_collectives(plan)]
    if plan.roofline:
        lines += ["", *_roofline(plan)]
    if plan.notes:
        lines += ["", *(f"note: {note}" for note in plan.notes)]
    return "\n".join(lines) + "\n"


def conclusions(plan) -> dict:
    """What `to_text` concludes from the fields: the verdict, totals by kind, and the prediction."""
    found: dict = {"verdict": _verdict(plan)}
    found["collectives"] = [
        {"kind": row.kind, "axes": row.axes, "group": row.group, "runs": row.runs,
         "bytes_sent": row.wire, "seconds_at_least": row.seconds}
        for row in merged(plan.collectives)
    ]  # fmt: skip
    if plan.roofline:
        found["prediction"] = {
            "note": PREDICTION,
            **{
                name: {
                    "seconds": seconds,
                    "mfu": plan.utilization(seconds),
                    "hfu": plan.utilization(seconds, recomputed=True),
                }
                for name, seconds in (
                    ("all_overlapped", plan.roofline.overlapped),
                    ("none_overlapped", plan.roofline.serial),
                )
            },
        }
    return found


def _head(plan) -> list[str]:
    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items())
    tools = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return [
        f"PLAN for {plan.target}, {plan.devices} devices, mesh {mesh}",
        f"lowered in {plan.seconds_to_lower:.1f} s, compiled for that hardware in "
        f"{plan.seconds_to_compile:.1f} s; nothing was run",
        f"by {tools}",
        f"verdict: {_verdict(plan)}",
    ]


def _verdict(plan) -> str:
    memory = plan.memory
    of = f"{_gib(memory.total)} of {_gib(memory.available)} a device"
    if plan.fits:
        return f"FITS, {of}, {_gib(memory.spare)} to spare"
    by = "says the compiler" if plan.refusal else "says its memory analysis"
    return f"DOES NOT FIT, needs {of}: {_gib(-memory.spare)} too much, {by}"


def _memory(plan) -> list[str]:
    memory = plan.memory
    rows = [(name, size, "") for name, size in memory.labelled.items()]
    rows.append(("other arguments", memory.other_arguments, ""))
    if memory.arguments is not None:
        exact = sum(size for _, size, _ in rows)
        rows += [
            ("padding", memory.arguments - exact, "arguments as laid out, less those above"),
            ("outputs", memory.outputs - memory.aliased, "beyond those in donated arguments"),
            ("temporaries", memory.temporaries, "activations, gradients, gathered weights"),
            ("code", memory.code, ""),
        ]
    rows.append(("total", memory.total, f"of {_gib(memory.available)}"))
    lines = ["memory a device"]
    lines += [f"  {name:<18}{_gib(size):>14}  {why}".rstrip() for name, size, why in rows]
    if memory.arguments is not None:
        lines.append(f"  {'donated':<18}{_gib(memory.aliased):>14}  of outputs reuse arguments")
    if plan.largest:
        lines.append("  largest values of the step, whole, before sharding:")
        lines += [f"    {text}"[:_WIDTH] for text in plan.largest]
    return lines


def _flops(plan) -> list[str]:
    flops, exact = plan.flops, "" if plan.flops.notes else " (exact, from the jaxpr)"
    lines = [
        f"matrix FLOPs a step, all devices{exact}",
        f"  {'model':<18}{flops.model:>14.4e}",
        f"  {'recomputed':<18}{flops.recomputed:>14.4e}  by jax.checkpoint",
        f"  {'executed':<18}{flops.total:>14.4e}  {flops.kernels:.3e} of it in Pallas kernels",
    ]
    if plan.device_flops and NOT_COUNTED not in plan.notes:
        share = plan.device_flops * plan.devices / max(1, flops.total)
        lines.append(
            f"  {'compiled':<18}{plan.device_flops * plan.devices:>14.4e}  {share:.3f} of executed"
            + (": some products are computed on several devices" if share > 1.02 else "")
        )
    if plan.xla_flops is not None:
        lines.append(
            f"  {'XLA cost_analysis':<18}{plan.xla_flops:>14.4e}  a device, loop bodies once"
        )
    return lines


def _collectives(plan) -> list[str]:
    header = f"  {'kind':<20}{'axes':<18}{'group':>6}{'runs':>7}{'sent':>12}{'at least':>12}"
    lines = ["collectives a step, by one device (at least: lower bound of the time)", header]
    for row in merged(plan.collectives):
        axes = "+".join(row.axes) or "-"
        lines.append(
            f"  {row.kind:<20}{axes:<18}{row.group:>6}{row.runs:>7}"
            f"{_gib(row.wire):>12}{_ms(row.seconds):>12}"
        )
    return lines


def merged(collectives: tuple[Collective, ...]) -> list[Collective]:
    """One row a kind, axes and group size; the largest on the wire first."""
    rows: dict[tuple, Collective] = {}
    for one in collectives:
        key = (one.kind, one.axes, one.group)
        old = rows.get(key)
        rows[key] = (
            one
            if old is None
            else dataclasses.replace(
                old,
                runs=old.runs + one.runs,
                wire=old.wire + one.wire,
                seconds=old.seconds + one.seconds,
            )
        )
    return sorted(rows.values(), key=lambda row: -row.wire)


def _roofline(plan) -> list[str]:
    roof = plan.roofline

    def used(seconds: float) -> str:
        mfu = plan.utilization(seconds)
        return f"MFU {mfu:.3f}, HFU {plan.utilization(seconds, recomputed=True):.3f}"

    rows = [
        ("compute", roof.compute, f"{plan.device_flops:.3e} FLOPs a device at peak"),
        ("memory", roof.memory, f"about {_gib(plan.hbm_bytes)} to and from HBM"),
        ("interconnect", roof.interconnect, "collectives one after another"),
        ("all overlapped", roof.overlapped, f"largest of the three: {used(roof.overlapped)}"),
        ("op by op", roof.operations, "compute or memory an operation, no collective"),
        ("none overlapped", roof.serial, f"sum of the three: {used(roof.serial)}"),
    ]
    return [PREDICTION] + [f"  {name:<18}{_ms(t):>14}  {why}" for name, t, why in rows]


def _gib(size: float) -> str:
    if abs(size) >= 2**30 / 10:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.2f} MiB" if abs(size) >= 2**20 / 10 else f"{size / 2**10:.1f} KiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
