"""A parametric partial differential equation: screened Poisson on a rectangle, from its boundary.

    -(u_xx + u_yy) + kappa u = 0    on (0, 1) x (0, height),    u = g on the boundary

for one coefficient, kappa, and one quantity of the geometry, the height. Five-point differences on
n x n inner points, n + 1 steps a side, are solved to rounding: the second difference has the sines
as its eigenvectors, so in their basis the system is diagonal. For each parameter the field is a
linear function of the boundary values.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from efficient.data.generated import GeneratedSource, require
from efficient.data.pipeline import Example, Source, source

KAPPA, HEIGHT = (0.1, 100.0), (0.5, 2.0)
MODES = 5  # of boundary data on a side


def sine_basis(n: int) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, " n"]]:
    """Eigenvectors (symmetric, orthogonal) and eigenvalues of the matrix of -1, 2, -1."""
    k = np.arange(1, n + 1)
    vectors = np.sqrt(2 / (n + 1)) * np.sin(np.pi * np.outer(k, k) / (n + 1))
    return vectors, 4 * np.sin(np.pi * k / (2 * (n + 1))) ** 2


def solve(
    boundary: Float[np.ndarray, "4 n"], kappa: float, height: float
) -> Float[np.ndarray, "n n"]:
    """u at inner points [x, y] from g at x = 0, x = 1 (by y), y = 0 and y = height (by x)."""
    n = boundary.shape[1]
    vectors, values = sine_basis(n)
    of_x, of_y = (n + 1.0) ** 2, ((n + 1) / height) ** 2  # 1 / step^2
    known = np.zeros((n, n))
    known[0] += of_x * boundary[0]
    known[-1] += of_x * boundary[1]
    known[:, 0] += of_y * boundary[2]
    known[:, -1] += of_y * boundary[3]
    diagonal = of_x * values[:, None] + of_y * values + kappa
    return vectors @ ((vectors @ known @ vectors) / diagonal) @ vectors


@dataclasses.dataclass(frozen=True)
class ScreenedPoisson:
    """See `screened_poisson`."""

    grid: int

    @property
    def facts(self) -> dict:
        return {"in_features": 4 * self.grid, "out_features": self.grid**2, "parameters": 2}

    def sample(self, rng: np.random.Generator) -> Example:
        place = rng.uniform(-1, 1, 2)
        low, high = np.log(KAPPA)
        kappa = np.exp(low + (high - low) * (place[0] + 1) / 2)
        height = HEIGHT[0] + (HEIGHT[1] - HEIGHT[0]) * (place[1] + 1) / 2
        k = np.arange(MODES)
        at = np.arange(1, self.grid + 1) / (self.grid + 1)
        boundary = (rng.normal(size=(4, MODES)) / (1 + k)) @ np.cos(np.pi * np.outer(k, at))
        return {
            "data": boundary.reshape(-1).astype(np.float32),
            "parameters": place.astype(np.float32),
            "target": solve(boundary, kappa, height).reshape(-1).astype(np.float32),
        }


@source("screened_poisson")
def screened_poisson(
    split: str, *, grid: int = 16, train_size: int = 20_000, eval_size: int = 1_000, seed: int = 0
) -> Source:
    """Boundary values and parameters of a screened Poisson equation, and its solution.

    Kappa is drawn log-uniformly from 0.1 to 100, the height uniformly from 0.5 to 2, and each
    side's boundary values are sums of five cosines of Gaussian amplitudes 1 / (1 + k).

    Examples: data float32 [4 n], the sides x = 0, x = 1, y = 0, y = height; parameters float32 [2],
    log kappa and height, each from -1 to 1; target float32 [n n], the field by x, then y.

    Args:
      grid: n.
    """
    require(grid >= 2, f"data.grid={grid} must be 2 or more")
    size = train_size if split == "train" else eval_size
    return GeneratedSource(ScreenedPoisson(grid), split, size, seed, disjoint=False)
