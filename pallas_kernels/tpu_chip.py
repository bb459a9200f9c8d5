"""What plans of TPU kernels may know of the chip that a program is traced for."""

from typing import NamedTuple

from pallas_kernels import compat


class Chip(NamedTuple):
    """A chip as one program sees it; by default what v5e, v5p and v6e all have, and two cores.

    vmem: bytes on chip, of a core. cores: that share a grid with a "parallel" dimension.
    mxu: rows and columns of a matrix unit. ridge: FLOPs in bfloat16 in the time of a byte of HBM;
    None where the chip is not known.
    """

    vmem: int = 64 * 2**20
    cores: int = 2
    mxu: int = 128
    ridge: float | None = None

    @property
    def bundle_flops(self) -> int:
        """FLOPs in bfloat16 of a bundle whose matrix units are all at work."""
        return 8 * self.mxu**2

    @property
    def planned(self) -> int:
        """Bytes that a plan may count. The compiler may need some more, for registers put out."""
        return self.vmem // 64 * 61

    @property
    def limit(self) -> int:
        """Bytes that the compiler may fill."""
        return self.vmem // 64 * 63

    def shares(self, steps: int) -> int:
        """Into how many equal parts so many steps are split, one a core; 1 where they cannot be."""
        return self.cores if steps % self.cores == 0 else 1


def chip() -> Chip:
    """That of the mesh in whose context this is traced, or else of the default device.

    Where neither is a TPU, as where a program is compiled on a CPU for another machine and no mesh
    is set, it is `Chip()`, whose plans fit those three.
    """
    known = compat.tpu_facts()
    return Chip() if known is None else Chip(*known)
