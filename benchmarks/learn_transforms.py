"""Fast transforms learned from data: Fourier, cosine, Hadamard and convolution.

    python -m benchmarks.learn_transforms [--n 64] [--steps 8000] [--json PATH]

Given pairs (x, y = T x) of Gaussian x, Adam trains complex factors from random unitary ones, as in
"Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations" (Dao et al. 2019,
arXiv 1903.05895, and its code, `ortho_init`) but with the input's permutation given, not learned.
`butterfly` has log2(n) factors after a bit reversal, `monarch` two after the transposition, both in
O(n log n) and O(n sqrt n); a convolution has two such products, and of the cosine transform the
real part is taken, after the reordering of Makhoul (1980). From Gaussian entries, and with learning
rates up to 0.03, no butterfly came below 0.1 for the cosine transform or 2.6e-4 for convolution.

Several seeds and learning rates run together; of each transform the best root mean square error on
held-out x is printed, how many of the runs are below 1e-4, and the error of a matrix of equal
parameters in low-rank form, the best that there is.
`projected` needs no training: least squares, then the nearest Monarch matrix in closed form.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.records import record
from efficient.linears.monarch import monarch_matrix, monarch_multiply, monarch_project
from pallas_kernels.butterfly_matmul import butterfly_matmul

SEEDS, PEAKS = 4, (3e-2, 1e-1, 2e-1)
REACHED = 1e-4


def transforms(n: int) -> dict[str, tuple[np.ndarray, bool, int, np.ndarray]]:
    """name -> (T [n, n], whether the real part is taken, products, order of the inputs)."""
    at = np.arange(n)
    dft = np.exp(-2j * np.pi * np.outer(at, at) / n) / np.sqrt(n)
    cosine = np.cos(np.pi * np.outer(at, at + 0.5) / n) * np.sqrt(2 / n)
    cosine[0] /= np.sqrt(2)
    hadamard = np.ones((1, 1))
    while hadamard.shape[0] < n:
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    kernel = np.random.default_rng(0).normal(size=n) / np.sqrt(n)
    convolution = kernel[(at[:, None] - at) % n]
    makhoul = np.concatenate([at[::2], at[1::2][::-1]])
    return {
        "dft": (dft, False, 1, at),
        "dct": (cosine, True, 1, makhoul),
        "hadamard": (hadamard / np.sqrt(n), True, 1, at),
        "convolution": (convolution, True, 2, at),
    }


def orders(n: int) -> dict[str, np.ndarray]:
    """The fixed permutation of each class."""
    bits = n.bit_length() - 1
    at, m = np.arange(n), round(n**0.5)
    reversed_bits = sum(((at >> b) & 1) << (bits - 1 - b) for b in range(bits))
    return {"butterfly": reversed_bits, "monarch": at.reshape(m, m).T.reshape(-1)}


def shapes(kind: str, n: int) -> list[tuple[int, ...]]:
    """Of the factors of one product, complex."""
    m = round(n**0.5)
    return [(m, m, m)] * 2 if kind == "monarch" else [(n.bit_length() - 1, n // 2, 2, 2)]


def product(kind: str, x, factors):
    if kind == "monarch":
        return monarch_multiply(x, *factors, x.shape[-1])
    return butterfly_matmul(x, *factors, implementation="reference")


def complex_of(parameters):
    """Factors of all products of pairs (real, imaginary)."""
    return [[jax.lax.complex(*pair) for pair in one] for one in parameters]


def apply(kind: str, permuted: bool, real: bool, parameters, x):
    order = orders(x.shape[-1])[kind]
    for factors in complex_of(parameters):
        x = product(kind, (x[..., order] if permuted else x).astype(jnp.complex64), factors)
    return x.real if real else x


def draw(kind: str, n: int, products: int, key):
    """Factors whose blocks are unitary, uniform by Haar's measure."""
    keys = iter(jax.random.split(key, 4))

    def unitary(shape):
        real, imaginary = jax.random.normal(next(keys), (2, *shape))
        q, r = jnp.linalg.qr(jax.lax.complex(real, imaginary))
        phase = jnp.diagonal(r, axis1=-2, axis2=-1)
        q *= (phase / jnp.abs(phase))[..., None, :]
        return [q.real, q.imag]

    return [[unitary(shape) for shape in shapes(kind, n)] for _ in range(products)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def fit(kind, permuted, real, products, steps, x, y, key, peak):
    """Factors after Adam on the mean square error of all of x."""
    parameters = draw(kind, x.shape[-1], products, key)
    optimizer = optax.adam(optax.cosine_decay_schedule(peak, steps))

    def loss(parameters):
        return jnp.mean(jnp.abs(apply(kind, permuted, real, parameters, x) - y) ** 2)

    def step(carry, _):
        parameters, state = carry
        value, gradient = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(parameters, updates), state), value

    start = parameters, optimizer.init(parameters)
    return jax.lax.scan(step, start, length=steps)[0][0]


def rmse(found, target) -> float:
    return float(np.sqrt(np.mean(np.abs(np.asarray(found) - target) ** 2)))


def data(matrix: np.ndarray, order: np.ndarray, count: int, seed: int):
    """(x in the given order, y)."""
    x = np.random.default_rng(seed).normal(size=(count, matrix.shape[0]))
    return x[:, order].astype(np.float32), x @ matrix.T


def learn(kind: str, name: str, n: int, steps: int) -> dict:
    """The best of all seeds and learning rates."""
    matrix, real, products, order = transforms(n)[name]
    x, y = data(matrix, order, 4 * n, 1)
    dtype = np.float32 if real else np.complex64
    permuted = name != "hadamard"
    grid = [(seed, peak) for seed in range(SEEDS) for peak in PEAKS]
    keys = jnp.stack([jax.random.key(seed) for seed, _ in grid])
    peaks = jnp.array([peak for _, peak in grid])
    run = functools.partial(fit, kind, permuted, real, products, steps, x, y.astype(dtype))
    found = jax.vmap(run)(keys, peaks)
    held_out, target = data(matrix, order, 4 * n, 2)
    errors = [
        rmse(
            apply(kind, permuted, real, jax.tree.map(lambda a, i=i: a[i], found), held_out), target
        )
        for i in range(len(grid))
    ]
    count = 2 * products * sum(int(np.prod(s)) for s in shapes(kind, n))
    rank = max(1, count // (2 * n) // (1 if real else 2))  # two real factors, or two complex ones
    tail = np.linalg.svd(matrix, compute_uv=False)[rank:]
    return {
        "class": kind,
        "transform": name,
        "n": n,
        "real_parameters": count,
        "rmse": min(errors),
        "reached": sum(e < REACHED for e in errors),
        "runs": len(errors),
        "low_rank_rmse": float(np.sqrt(np.sum(tail**2) / n)),
    }


def project(name: str, n: int) -> dict:
    """Least squares of as many pairs as there are features, then the nearest Monarch matrix."""
    matrix = transforms(n)[name][0]
    order = orders(n)["monarch"] if name == "dft" else np.arange(n)
    x, y = data(matrix, order, n, 1)
    solved = np.linalg.lstsq(x.astype(np.float64), y, rcond=None)[0]
    dtype = jnp.float32 if np.isrealobj(matrix) else jnp.complex64
    right, left = monarch_project(jnp.asarray(solved, dtype), round(n**0.5))
    held_out, target = data(matrix, order, 4 * n, 2)
    found = np.asarray(monarch_matrix(right, left, n, n))
    return {"class": "projected", "transform": name, "n": n, "rmse": rmse(held_out @ found, target)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    n = arguments.n
    if n < 4 or n & (n - 1) or round(n**0.5) ** 2 != n:
        parser.error(f"--n {n}: a power of four, such as 64 or 256")
    records = []
    for name in transforms(n):
        for kind in ("monarch", "butterfly"):
            records.append(learn(kind, name, n, arguments.steps))
            print(records[-1], flush=True)
        if name in ("dft", "hadamard"):
            records.append(project(name, n))
            print(records[-1], flush=True)
    if arguments.json:
        command = f"python -m benchmarks.learn_transforms --n {n} --steps {arguments.steps}"
        record(arguments.json, command, records=records)


if __name__ == "__main__":
    main()
