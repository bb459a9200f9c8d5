"""How well the predicted times agree with hardware: kernels whose time on a TPU others published.

    python -m pallas_kernels.lab.calibration

compiles them and prints prediction, measurement and error. Two sources:

* JAX's guide to matrix multiplication in Pallas (docs.jax.dev, pallas/tpu/matmul), run on a v5e:
  times by `timeit`, so with the dispatch. Its kernel is `jax.experimental.pallas.ops.tpu.matmul`.
* The autotuning timings shipped with tokamax 0.0.12 to 0.0.17 for the full attention forward at
  T 16,384: fractions of the peak, rounded to a hundredth, of a kernel that descends from jax's
  splash attention and at its best block sizes, which are not jax's nor these.
"""

import dataclasses
import os
from collections.abc import Iterator

from pallas_kernels.lab.chips import chip

# Bounds on the error of prediction: to either side for kernels with blocks of 512 and more, and for
# those with blocks of 128. Last: -22% to +15% and -71% to -68% (jax 0.10.2, libtpu 0.0.52). Every
# version of the compiler has schedules of its own, by which errors move a few points.
LARGE = 0.25
SMALL = (-0.75, -0.60)

STATEMENT = f"""\
Against published times the prediction is within {LARGE:.0%} on 8 kernels with blocks of 512
and more, and {-SMALL[1]:.0%} to {-SMALL[0]:.0%} too short on 2 with blocks of 128, where each step
waits for its copies: waits for memory are in no schedule."""


@dataclasses.dataclass(frozen=True)
class Anchor:
    """A kernel with a published time.

    Attributes:
      name: of the kernel and its shape.
      target: chip kind.
      flops, hbm_bytes: of the whole kernel.
      seconds: measured.
    """

    name: str
    target: str
    flops: float
    hbm_bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Result:
    """An anchor with its prediction and the matrix-unit use of its largest region."""

    anchor: Anchor
    seconds: float
    mxu_use: float

    @property
    def error(self) -> float:
        """Relative: +0.1 where the model says a tenth more time than was measured."""
        return self.seconds / self.anchor.seconds - 1


# (size of a cube, block, seconds)
_MATMULS = (
    (4096, (512, 1024, 1024), 0.88909e-3),
    (8192, (512, 1024, 1024), 6.09943e-3),
    (4096, (128, 128, 128), 11.77152e-3),
    (8192, (128, 128, 128), 91.83577e-3),
)
# (target, head size, fraction of the peak)
_ATTENTIONS = (
    ("v5p", 64, 0.46),
    ("v5p", 128, 0.89),
    ("v5p", 256, 0.89),
    ("v6e", 64, 0.19),
    ("v6e", 128, 0.36),
    ("v6e", 256, 0.64),
)
_LENGTH, _HEADS = 16_384, 2
_BLOCKS = (1024, 2048, 512)  # block_q, block_kv, block_kv_compute
_SMALLER_BLOCKS = (1024, 1024, 512)  # for v5p's 16 MiB of scoped VMEM at head size 256


def results(names: tuple[str, ...] | None = None) -> Iterator[Result]:
    """Compiles the anchors, all or those named; each takes seconds."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.lab import peers
    from pallas_kernels.lab.tpu import compile_tpu

    for anchor, program, shapes in _anchors(peers):
        if names is not None and anchor.name not in names:
            continue
        report = compile_tpu(
            program, [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes], anchor.target
        )
        if report.reason:
            raise ValueError(f"{anchor.name} on {anchor.target}: {report.reason}")
        (kernel,) = report.kernels
        seconds = max(
            kernel.schedule_seconds(anchor.flops),
            anchor.flops / chip(anchor.target).peak_flops,
            anchor.hbm_bytes / chip(anchor.target).hbm_bandwidth,
        )
        yield Result(anchor, seconds, kernel.mxu_use(anchor.flops))


def _anchors(peers):
    for size, block, seconds in _MATMULS:
        name = f"matmul {size}, blocks {'x'.join(map(str, block))}"
        # An operand's blocks are read again for each block of the other's kept dimension.
        moved = 2 * size * size * (size // block[0] + size // block[1] + 1)
        anchor = Anchor(name, "v5e", 2 * size**3, moved, seconds)
        yield anchor, peers.matmul((block,))[0], [(size, size)] * 2
    for target, head, fraction in _ATTENTIONS:
        shape = (1, _LENGTH, _HEADS, head)
        flops = 4 * _HEADS * _LENGTH**2 * head
        blocks = _SMALLER_BLOCKS if (target, head) == ("v5p", 256) else _BLOCKS
        moved = 2 * _HEADS * _LENGTH * head * (2 + 2 * _LENGTH // blocks[0])
        seconds = flops / (chip(target).peak_flops * fraction)
        anchor = Anchor(f"attention, head {head}", target, flops, moved, seconds)
        yield anchor, peers.splash_forward("full", (blocks,))[0], [shape] * 3


def main() -> None:
    """Prints the table, and the sentence that the report ends with."""
    print(f"{'kernel':36}{'target':8}{'measured':>12}{'predicted':>12}{'error':>8}{'matrix':>8}")
    for r in results():
        print(
            f"{r.anchor.name:36}{r.anchor.target:8}{r.anchor.seconds * 1e6:9.0f} us"
            f"{r.seconds * 1e6:9.0f} us{r.error:+8.0%}{r.mxu_use:8.2f}",
            flush=True,
        )
    print(STATEMENT)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
