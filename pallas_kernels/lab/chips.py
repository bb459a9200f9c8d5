"""The accelerators the laboratory compiles for, as numbers: powers of ten, per second."""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's public figures.

    Attributes:
      topology: the smallest slice that compile-only devices can be had for; "" for a GPU.
      peak_flops: dense bf16 matrix FLOP/s of the chip.
      hbm_bandwidth: read and write together.
      flops_per_cycle: of one core's matrix units, bf16; 0 for a GPU.
      cores: cores that share one program's grid where it has a "parallel" dimension.
    """

    topology: str
    peak_flops: float
    hbm_bandwidth: float
    flops_per_cycle: int = 0
    cores: int = 1

    @property
    def clock(self) -> float:
        """Bundles a second of one core. The peak over FLOPs a cycle, so no faster than the peak."""
        return self.peak_flops / (self.flops_per_cycle * self.cores)


# Peaks and bandwidths: the pages "TPU v5e", "TPU v5p", "TPU v6e" of the Cloud TPU documentation;
# NVIDIA's H200 datasheet (SXM), half of the bf16 figure with sparsity. FLOPs a cycle of a core:
# four arrays of 128 x 128 on v5e and v5p, of two cores; arrays of 256 x 256 on v6e.
CHIPS: dict[str, Chip] = {
    "v5e": Chip("v5e:2x2", 197e12, 819e9, 131_072),
    "v5p": Chip("v5p:2x2x1", 459e12, 2765e9, 131_072, cores=2),
    "v6e": Chip("v6e:2x2", 918e12, 1638e9, 524_288),
    "h200": Chip("", 989.5e12, 4800e9),
}


def chip(target: str) -> Chip:
    """The chip of a target such as "v6e" or "v6e:2x2".

    Raises:
      ValueError: no such target; the message names the nearest.
    """
    kind = target.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"unknown target {target!r}; {nearest(kind, CHIPS)}")
    return CHIPS[kind]


def topology(target: str) -> str:
    """The topology to compile for: "v6e" means the smallest slice, "v6e:4x4" itself."""
    return target if ":" in target else chip(target).topology


def nearest(name: str, options) -> str:
    """A hint for a misspelt `name`: the nearest of `options`, or all where none is near."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "one of: " + ", ".join(options)
