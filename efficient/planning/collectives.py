"""The collectives of a compiled program: what they move, between which chips, and how long.

Times are lower bounds from link bandwidth and hop latency, after part 3 of the JAX scaling book
(jax-ml.github.io/scaling-book/sharding). With V the bytes of the unsharded array, n the group, and
W the bandwidth into one chip over the torus axes that the group spans:

  all-gather, reduce-scatter   V (n-1)/n / W
  all-reduce                   twice that
  all-to-all                   V (longest axis) / n / (4 W), twice that on an open axis
  collective-permute           the bytes sent over one link, or those of all pairs times their hops
                               over all links of the torus

An axis that closes into a ring brings both its links, an open one the one link its end chip has. A
group of every s-th chip along an axis shares those links with s - 1 other groups. Real
collectives also pay for synchronisation, for padding and for algorithms less perfect than these;
how far they hide behind compute is the scheduler's doing and not modelled.
"""

import dataclasses
import math
import re

import numpy as np

from efficient.planning.hardware import Target
from efficient.planning.hlo import COLLECTIVES, Computation, Instruction, Module

_HOP_LATENCY = 1e-6  # seconds; the scaling book's round figure for one ICI hop


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, all its runs in a step together.

    Attributes:
      kind: 'all-gather', 'all-reduce', ...
      axes: names of the mesh axes the group spans; empty where it fits none.
      group: devices that take part together.
      runs: times it runs in a step.
      payload: bytes a run of the whole array: gathered, or before it is scattered or reduced.
      wire: bytes one device sends in a step, all runs, by the best algorithm.
      seconds: lower bound of its time in a step, all runs.
      source: the operation that asked for it, as in the program's own names.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    runs: int
    payload: int
    wire: int
    seconds: float
    source: str


def find_collectives(module: Module, target: Target, mesh) -> list[Collective]:
    """Every collective of the module, the largest on the wire first.

    Asynchronous ones count once, and so do those the TPU compiler spreads over several fusions.
    """
    found, chains = [], {}
    for computation, instruction, times in module.scheduled():
        for inner, collective in _inside(module, computation, instruction):
            described = _describe(inner, collective, times, target, mesh)
            if not described.source:
                described = dataclasses.replace(described, source=_op_name(instruction))
            if "chain_id=" in collective.attributes:
                # One collective seen in the fusions that start, carry and end it.
                chains.setdefault(collective.attribute("channel_id"), []).append(
                    (not _starts_chain(inner), described)
                )
            else:
                found.append(described)
    found += [min(seen, key=lambda entry: entry[0])[1] for seen in chains.values()]
    return sorted((c for c in found if c.runs), key=lambda c: -c.wire)


def _inside(module: Module, computation: Computation, instruction: Instruction):
    if instruction.kind in COLLECTIVES and not instruction.opcode.endswith("-done"):
        yield computation, instruction
    elif instruction.opcode == "fusion":
        for name in instruction.called:
            fused = module.computations[name]
            for inner in fused.instructions.values():
                yield from _inside(module, fused, inner)


def _starts_chain(fused: Computation) -> bool:
    return any("AsyncCollectiveStart" in i.attributes for i in fused.instructions.values())


def _describe(
    computation: Computation, instruction: Instruction, times: int, target: Target, mesh
) -> Collective:
    kind = instruction.kind
    if kind == "all-reduce" and _only_sliced(computation, instruction):
        kind = "reduce-scatter"  # how the TPU compiler writes one
    operands = [computation.instructions[n] for n in instruction.operands]
    local = sum(shape.logical_bytes for i in operands for shape in i.shapes)
    devices = target.device_count
    groups = replica_groups(instruction.attributes, devices)
    pairs = _pairs(instruction.attributes)
    group = 2 if kind == "collective-permute" else groups.shape[1]
    payload = local * group if kind in ("all-gather", "all-to-all") else local
    wire = {
        "all-gather": local * (group - 1),
        "all-reduce": 2 * local * (group - 1) // group,
        "collective-permute": local,
        "collective-broadcast": local,
    }.get(kind, local * (group - 1) // group)
    members = groups[0]
    if kind == "collective-permute" and len(pairs):
        members = pairs[0]
        seconds = permute_seconds(
            payload, np.stack([_coordinates(target, mesh, p) for p in pairs]), target
        )
    else:
        seconds = collective_seconds(kind, payload, _coordinates(target, mesh, members), target)
    return Collective(
        kind=kind,
        axes=_axes(mesh, members),
        group=group,
        runs=times,
        payload=payload,
        wire=wire * times,
        seconds=seconds * times if group > 1 else 0.0,
        source=_op_name(instruction),
    )


def _op_name(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found.group(1) if found else ""


def _only_sliced(computation: Computation, instruction: Instruction) -> bool:
    pending, sliced = [instruction.name], False
    while pending:
        for user in computation.users.get(pending.pop(), []):
            if user.opcode in ("bitcast", "reshape", "get-tuple-element", "copy"):
                pending.append(user.name)
            elif user.opcode != "dynamic-slice":
                return False
            else:
                sliced = True
    return sliced


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The groups of a collective as an integer array [groups, members].

    Reads the three spellings of HLO: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)` and
    `mesh['a'=2,'b'=2] {'a'}`. One group of all devices where none is written.
    """
    everyone = np.arange(devices).reshape(1, devices)
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})?\}", attributes)
    if listed:
        rows = re.findall(r"\{([\d,]+)\}", listed.group(1) or "")
        return np.array([[int(d) for d in row.split(",")] for row in rows]) if rows else everyone
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims = _integers(iota.group(1)), _integers(iota.group(2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(_integers(iota.group(3))) if iota.group(3) else ids
        return ids.reshape(shape)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if named:
        return _mesh_groups(named.group(1), named.group(2))
    return everyone


def _mesh_groups(mesh_text: str, axes_text: str) -> np.ndarray:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh_text)}
    # A sub-axis 'a':(2)4 is the axis split into 2 x 4 x rest, of which the 4 is meant.
    split: list[tuple[str, int, bool]] = []
    wanted = {
        name: (int(before), int(size)) if before else None
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes_text)
    }
    for name, size in sizes.items():
        if wanted.get(name):
            before, middle = wanted[name]
            parts = [(before, False), (middle, True), (size // (before * middle), False)]
        else:
            parts = [(size, name in wanted)]
        split += [(name, n, chosen) for n, chosen in parts]
    ids = np.arange(math.prod(sizes.values())).reshape([n for _, n, _ in split])
    inside = [i for i, (_, _, chosen) in enumerate(split) if chosen]
    outside = [i for i in range(len(split)) if i not in inside]
    members = math.prod(split[i][1] for i in inside)
    return ids.transpose(outside + inside).reshape(-1, members)


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _pairs(attributes: str) -> list[np.ndarray]:
    found = re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes)
    rows = re.findall(r"\{(\d+),(\d+)\}", found.group(1) + "}") if found else []
    return [np.array([int(a), int(b)]) for a, b in rows if a != b]


def _axes(mesh, members: np.ndarray) -> tuple[str, ...]:
    """Mesh axes along which the members differ, if they are all of those axes."""
    places = np.stack(np.unravel_index(members, mesh.devices.shape))
    varying = [i for i, row in enumerate(places) if len(set(row)) > 1]
    whole = math.prod(mesh.devices.shape[i] for i in varying) == len(members)
    return tuple(mesh.axis_names[i] for i in varying) if whole else ()


def _coordinates(target: Target, mesh, members: np.ndarray) -> np.ndarray:
    """Physical places [members, axes of the torus]; hosts and GPUs for a GPU."""
    devices = mesh.devices.reshape(-1)
    if target.chip.axes == 0:
        return np.stack(np.unravel_index(members, target.topology), axis=1)
    axes = len(target.topology)
    return np.array([devices[m].coords[:axes] for m in members])


def collective_seconds(kind: str, payload: int, places: np.ndarray, target: Target) -> float:
    """Lower bound of one run's time. `payload` as in `Collective`, `places` [members, axes]."""
    n, chip = len(places), target.chip
    if chip.axes == 0:
        across = len(set(places[:, 0])) > 1
        bandwidth = chip.network_bandwidth if across else chip.link_bandwidth
        share = (n - 1) / n / (n if kind == "all-to-all" else 1)
        return (2 if kind == "all-reduce" else 1) * payload * share / bandwidth
    link = chip.link_bandwidth / chip.devices  # the devices of a chip share its links
    bandwidth, hops, longest, is_open = 0.0, 0, 1, False
    for axis in range(places.shape[1]):
        where = np.unique(places[:, axis])
        if len(where) == 1:
            continue
        stride = int(np.diff(where).min())
        ring = target.wraps(axis) and stride * len(where) == target.topology[axis]
        ring = ring and len(where) > 2
        bandwidth += (2 if ring else 1) * link / stride
        span = int(where[-1] - where[0])
        hops += (target.topology[axis] // 2) if ring else span
        longest, is_open = max(longest, len(where)), is_open or not ring
    if bandwidth == 0.0:
        return 0.0  # within a chip
    if kind in ("all-to-all", "ragged-all-to-all"):
        transfer = payload * longest / n / (4 * bandwidth) * (2 if is_open else 1)
    else:
        transfer = payload * (n - 1) / n / bandwidth
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * max(transfer, hops * _HOP_LATENCY)


def permute_seconds(payload: int, pairs: np.ndarray, target: Target) -> float:
    """Lower bound of one collective-permute: `payload` bytes from each first to each second.

    A message streams through the chips between, so that its hops cost no time of their own but
    take up links. Those of all pairs can at best be spread over all links evenly.

    Args:
      pairs: places as of `_coordinates`, [pairs, 2, axes].
    """
    chip = target.chip
    if chip.axes == 0:
        across = (pairs[:, 0, 0] != pairs[:, 1, 0]).any()
        return payload / (chip.network_bandwidth if across else chip.link_bandwidth)
    hops = np.abs(pairs[:, 0] - pairs[:, 1])
    links = 0.0
    for axis, length in enumerate(target.topology):
        if target.wraps(axis):
            hops[:, axis] = np.minimum(hops[:, axis], length - hops[:, axis])
        links += 2 * (1 if target.wraps(axis) else (length - 1) / length)
    links *= math.prod(target.topology)
    if not hops.any():
        return 0.0  # within a chip
    bandwidth = chip.link_bandwidth / chip.devices  # the devices of a chip share its links
    load = max(1.0, hops.sum() / links / chip.devices)
    return max(load * payload / bandwidth, hops.sum(axis=1).max() * _HOP_LATENCY)
