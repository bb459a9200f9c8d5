"""Accelerators as numbers, and as compile-only devices on a machine that has none.

`Target.parse("v5e:16x16")` gives the real TPU compiler 256 devices to compile for;
`Target.parse("h200")` the same for one GPU. Nothing is run.
"""

import dataclasses
import importlib.util
import math
import os

import numpy as np

from efficient.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's public figures. Bandwidths are bytes a second, powers of ten.

    Attributes:
      peak_flops: dense bf16 matrix FLOP/s.
      hbm_bytes: memory a program may use, after what the runtime keeps for itself.
      hbm_bandwidth: read and write together.
      link_bandwidth: one link, one direction.
      axes: axes of the torus, two links each; 0 where every chip of a host reaches every other
        through a switch at `link_bandwidth`.
      network_bandwidth: a chip's share of the network between hosts, where there is no torus.
      devices: JAX devices a chip; each has that fraction of every figure.
      device_kinds: `jax.Device.device_kind` of the real thing.
    """

    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    device_kinds: tuple[str, ...]
    max_chips: int
    devices: int = 1
    network_bandwidth: float = 0.0


def _gib(amount: float) -> int:
    return int(amount * 2**30)


# Peak, HBM and interconnect (bidirectional bandwidth a chip = 2 x ports x one link one way) from
# the pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" of the Cloud TPU
# documentation (docs.cloud.google.com/tpu/docs). `hbm_bytes` is what the compiler of libtpu 0.0.51
# itself calls available when it refuses a program, a little below the page's figure.
CHIPS = {
    # 275 TFLOP/s, 32 GiB at 1200 GB/s. Six links of 50 GB/s each way: TPU v4 paper, arXiv
    # 2304.01433, table 4. The compile-only client has no megacore: two devices a chip, of
    # 15.25 GiB each, while a real v4 shows one.
    "v4": Chip(275e12, _gib(30.50), 1200e9, 50e9, 3, ("TPU v4",), 4096, devices=2),
    # 197 TFLOP/s, 16 GB at 819 GB/s, ICI 400 GB/s bidirectional over 4 ports.
    "v5e": Chip(197e12, _gib(15.75), 819e9, 50e9, 2, ("TPU v5 lite", "TPU v5e"), 256),
    # 459 TFLOP/s, 95 GiB usable at 2765 GB/s, ICI 1200 GB/s bidirectional over 6 ports.
    "v5p": Chip(459e12, _gib(95.73), 2765e9, 100e9, 3, ("TPU v5", "TPU v5p"), 6144),
    # 918 TFLOP/s, 32 GB at 1638 GB/s (TPU7x page), ICI 800 GB/s bidirectional over 4 ports.
    "v6e": Chip(918e12, _gib(31.24), 1638e9, 100e9, 2, ("TPU v6 lite", "TPU v6e"), 256),
    # 2307 TFLOP/s, 192 GiB at 7380 GB/s, ICI 1200 GB/s bidirectional over 6 ports; two devices.
    "tpu7x": Chip(2307e12, _gib(189.48), 7380e9, 100e9, 3, ("TPU7x",), 9216, devices=2),
    # NVIDIA H200 datasheet (SXM): 1,979 TFLOP/s bf16 with sparsity, half of it dense; 141 GB at
    # 4.8 TB/s; NVLink 900 GB/s, both directions together. Between hosts 400 Gb/s a GPU
    # (DGX H200 datasheet: ConnectX-7).
    "h200": Chip(
        989.5e12, 151_397_597_184, 4800e9, 450e9, 0, ("NVIDIA H200",), 1024, network_bandwidth=50e9
    ),
}

# For MFU alone: dense bf16 peaks of GPUs that are no target of a plan (NVIDIA datasheets, SXM).
_OTHER_PEAKS = {"NVIDIA H100 80GB HBM3": 989.5e12, "NVIDIA A100": 312e12}

# Slice shapes of the Cloud TPU documentation. Three-dimensional slices may further be any A x B x C
# of multiples of 4, A <= B <= C.
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SHAPES_3D = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def prepare_environment() -> None:
    """Makes compile-only work safe and quiet. Call it before anything starts a JAX backend.

    In `train.py`: the first statement of `main` when `--plan` was given, before the config is read
    (a config may touch `jax.devices()`). Keeps JAX on the CPU, and stops libtpu from asking a
    cloud metadata server who it is.

    Raises:
      UserError: a JAX backend other than the CPU is already up.
    """
    import jax
    from jax.extend import backend

    os.environ["JAX_PLATFORMS"] = "cpu"
    _quiet_libtpu()
    jax.config.update("jax_platforms", "cpu")
    if backend.get_backend().platform != "cpu":
        raise UserError(
            "a plan compiles on the CPU, but JAX already runs on "
            f"{backend.get_backend().platform}; start with JAX_PLATFORMS=cpu"
        )


def _quiet_libtpu() -> None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    # A plan holds no chip, so several may run at once; libtpu would else lock the second one out.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def peak_flops(device) -> float | None:
    """Dense bf16 peak of one real `jax.Device`, FLOP/s; None where it is not known (a CPU)."""
    kind = device.device_kind
    for name, chip in CHIPS.items():
        if kind in chip.device_kinds or (name == "h200" and kind.startswith("NVIDIA H200")):
            return chip.peak_flops / (1 if name == "v4" else chip.devices)
    for prefix, peak in _OTHER_PEAKS.items():
        if kind.startswith(prefix):
            return peak
    return None


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to compile for.

    Attributes:
      kind: a key of `CHIPS`.
      topology: chips along each axis of the torus; hosts and GPUs a host for a GPU.
    """

    kind: str
    topology: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Target":
        """Reads 'v5e:16x16', 'v5p:8x8x16', 'v6e:4x4', 'h200', 'h200:8' or 'h200:2x8'.

        Raises:
          UserError: no such chip, or no such topology of it.
        """
        kind, _, shape = name.strip().lower().partition(":")
        if kind not in CHIPS:
            raise UserError(f"unknown hardware {kind!r} in {name!r}; {nearest(kind, CHIPS)}")
        if kind == "h200":
            return cls(kind, _gpu_shape(name, shape))
        try:
            topology = tuple(int(n) for n in shape.split("x"))
        except ValueError:
            topology = ()
        if not _valid(kind, topology):
            raise UserError(_no_such_topology(kind, shape, topology))
        return cls(kind, topology)

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.topology))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def platform(self) -> str:
        """The lowering platform: 'tpu' or 'cuda'."""
        return "tpu" if self.chip.axes else "cuda"

    @property
    def device_count(self) -> int:
        return math.prod(self.topology) * self.chip.devices

    @property
    def device_peak_flops(self) -> float:
        return self.chip.peak_flops / self.chip.devices

    @property
    def device_hbm_bytes(self) -> int:
        return self.chip.hbm_bytes // self.chip.devices

    @property
    def device_hbm_bandwidth(self) -> float:
        return self.chip.hbm_bandwidth / self.chip.devices

    def wraps(self, axis: int) -> bool:
        """Whether the torus closes along `axis`.

        2D slices close only where they span the pod's 16 chips; 3D slices close when they are made
        of whole 4x4x4 cubes (Cloud TPU documentation, v5p; the JAX scaling book, part 2).
        """
        if self.chip.axes == 2:
            return self.topology[axis] == 16
        return all(n % 4 == 0 for n in self.topology)

    @property
    def devices(self) -> np.ndarray:
        """Compile-only devices, an object array shaped `topology` (+ one axis of a chip's devices).

        Reshape it into a mesh: `jax.sharding.Mesh(target.devices.reshape(16, 16), names)`.

        Raises:
          UserError: the compiler for this hardware is not installed.
        """
        if self.platform == "cuda":
            return _gpu_devices(self)
        return _tpu_devices(self)


def _valid(kind: str, topology: tuple[int, ...]) -> bool:
    if CHIPS[kind].axes == 2:
        return topology in _SHAPES_2D or topology == (4, 2)
    if topology in _SHAPES_3D:
        return True
    cubes = len(topology) == 3 and all(n > 0 and n % 4 == 0 for n in topology)
    in_pod = math.prod(topology) <= CHIPS[kind].max_chips
    return cubes and in_pod and list(topology) == sorted(topology)


def _no_such_topology(kind: str, shape: str, topology: tuple[int, ...]) -> str:
    if CHIPS[kind].axes == 2:
        shapes, rest = _SHAPES_2D, ""
    else:
        cubes = [(a, b, c) for c in (4, 8, 16) for b in (4, 8, 16) for a in (4, 8, 16)]
        shapes = _SHAPES_3D + tuple(sorted({tuple(sorted(s)) for s in cubes}, key=math.prod))
        shapes = tuple(s for s in shapes if math.prod(s) <= CHIPS[kind].max_chips)
        rest = ", or AxBxC of multiples of 4 in rising order"
    chips = max(1, math.prod(topology)) if topology else 1
    near = min(shapes, key=lambda s: abs(math.log(math.prod(s) / chips)))
    spelled = ["x".join(map(str, s)) for s in shapes]
    hint = f"did you mean {kind}:{'x'.join(map(str, near))}? " if topology else ""
    return (
        f"{shape or 'nothing'!r} is no topology of {kind}; {hint}Valid: {', '.join(spelled)}{rest}"
    )


def _gpu_shape(name: str, shape: str) -> tuple[int, int]:
    parts = shape.split("x") if shape else ["1"]
    if not all(p.isdigit() and int(p) for p in parts) or len(parts) > 2 or int(parts[-1]) > 8:
        raise UserError(
            f"{name!r} is no GPU target; give h200, h200:N with N up to 8 GPUs of one host, "
            "or h200:HxN for H hosts"
        )
    hosts, gpus = ("1", parts[0]) if len(parts) == 1 else parts
    return int(hosts), int(gpus)


def _tpu_devices(target: Target) -> np.ndarray:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"planning for {target} needs the TPU compiler; install it with: pip install -e .[lab]"
        )
    from jax.experimental import topologies

    _quiet_libtpu()
    found = topologies.get_topology_desc(platform="tpu", topology_name=str(target)).devices
    shape = target.topology + ((target.chip.devices,) if target.chip.devices > 1 else ())
    if len(found) != target.device_count:
        raise UserError(
            f"the compiler gives {len(found)} devices for {target}, not {target.device_count}; "
            "this release of libtpu differs from the one the table of chips was written for"
        )
    grid = np.empty(shape, dtype=object)
    cores: dict[tuple, int] = {}
    for device in found:
        place = tuple(device.coords[: len(target.topology)])
        core = cores.setdefault(place, 0)
        cores[place] += 1
        grid[place + ((core,) if target.chip.devices > 1 else ())] = device
    return grid


# The fields of GpuTargetConfigProto that the compiler reads, for an H200 (SXM).
_H200_CONFIG = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200"
"""


def _gpu_devices(target: Target) -> np.ndarray:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            f"planning for {target} needs NVIDIA's compilers (4.5 GB, no GPU): make lab-gpu, then"
            " run the same with .venv-gpu/bin/python"
        )
    from jax.experimental import topologies

    hosts, gpus = target.topology
    found = topologies.get_topology_desc(
        platform="cuda", target_config=_H200_CONFIG, topology=f"1x{hosts}x{gpus}"
    ).devices
    return np.array(found, dtype=object).reshape(target.topology)
