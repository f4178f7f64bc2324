"""What the activation benchmarks share: the planted problem, and every way to solve it that is compared.

A method takes activations `[p, n]` and a seed and returns an orthogonal matrix whose rows are the directions found.
Imports are inside the functions, so that a cold start pays for its own libraries only.
"""

import dataclasses
import sys

import numpy as np

EPS = 0.03  # of the objective, Log(EPS), that recovery is judged by beside the error


@dataclasses.dataclass(frozen=True)
class Problem:
    """`Y = X Dᵀ` plus whatever corrupts it, and the dictionary D."""

    y: np.ndarray
    dictionary: np.ndarray


def bernoulli_gaussian(
    n: int,
    p: int,
    theta: float,
    seed: int,
    *,
    noise: float = 0.0,
    outliers: float = 0.0,
    corruption: float = 0.0,
) -> Problem:
    """p examples of n activations that are Gaussian with probability θ and zero otherwise, in a Haar-random basis.

    `noise`: standard deviation of Gaussian noise. `outliers`: share of the examples that are replaced by standard
    Gaussian ones. `corruption`: share of the entries of Y that ±1 is added to.
    """
    rng = np.random.default_rng(seed)
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    dictionary = q * np.sign(np.diagonal(r))
    y = (rng.standard_normal((p, n)) * (rng.random((p, n)) < theta)) @ dictionary.T
    y += noise * rng.standard_normal((p, n))
    y += rng.choice([-1.0, 1.0], (p, n)) * (rng.random((p, n)) < corruption)
    replaced = rng.random(p) < outliers
    y[replaced] = rng.standard_normal((replaced.sum(), n))
    return Problem(y.astype(np.float32), dictionary)


def orthogonalised(a: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(np.asarray(a, np.float64))
    return u @ v


def error(r: np.ndarray, problem: Problem) -> float:
    """`1 - ‖R D‖₄⁴/n` of the nearest orthogonal matrix: zero where every direction is found. One for NaN."""
    if not np.isfinite(r).all():
        return 1.0
    return float(1 - np.sum((orthogonalised(r) @ problem.dictionary) ** 4) / len(r))


def objective(r: np.ndarray, problem: Problem, eps: float = EPS) -> float:
    """`E mean_i log(1 + z²/ε²)`."""
    z = problem.y @ orthogonalised(r).T.astype(np.float32) / np.sqrt(np.mean(problem.y**2))
    return float(np.mean(np.log1p((z / eps) ** 2), dtype=np.float64))


def random_start(n: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng([seed, 1]).standard_normal((n, n)))[0]


def rotsparse(y, seed, eps=EPS, starts=1):
    """`FixedPointNewton` from as many random rotations."""
    import jax
    import jax.numpy as jnp

    import rotsparse as rs

    objective = rs.ActivationSparsity(jnp.asarray(y), rs.Log(eps))
    start = {"in": jnp.asarray(random_start(y.shape[1], seed), jnp.float32)}
    method = rs.FixedPointNewton(random_starts=starts - 1)
    return np.asarray(rs.minimize(objective, start, method=method, key=jax.random.key(seed)).completed().bases["in"])


def fastica(y, seed):
    """scikit-learn's defaults: parallel, logcosh, whitening, tolerance 1e-4."""
    from sklearn.decomposition import FastICA

    return FastICA(random_state=seed).fit(y).components_


def picard(y, seed):
    """Picard-O with its default density, tanh. In float64: in float32 some problems end in NaN."""
    import picard

    found = picard.picard(y.T.astype(np.float64), ortho=True, extended=False, random_state=seed, fun="tanh")
    whitening, unmixing = found[:2]
    return unmixing @ whitening


def l4(y, seed, steps=200):
    """Matching, stretching and projection: `R <- polar((Y Rᵀ)³ᵀ Y)`, until R stands still."""
    r = random_start(y.shape[1], seed).astype(np.float32)
    for _ in range(steps):
        u, _, v = np.linalg.svd(((y @ r.T) ** 3).T @ y)
        last, r = r, u @ v
        if np.abs(r - last).max() < 1e-5:
            break
    return r


def pymanopt(y, seed, eps=0.1, start=None):
    """Conjugate gradients on the log measure. At ε = 0.1, because they stick in poor minima at a smaller one."""
    import pymanopt
    from pymanopt.manifolds import Stiefel
    from pymanopt.optimizers import ConjugateGradient

    # Its import switches JAX to double precision for the whole process.
    sys.modules["jax"].config.update("jax_enable_x64", False)

    n = y.shape[1]
    y = y / np.sqrt(np.mean(y**2))
    manifold = Stiefel(n, n)

    @pymanopt.function.numpy(manifold)
    def cost(r):
        return float(np.mean(np.log1p((y @ r.T / eps) ** 2), dtype=np.float64))

    @pymanopt.function.numpy(manifold)
    def gradient(r):
        z = y @ r.T
        return (2 * z / (z**2 + eps**2)).T @ y / y.size

    problem = pymanopt.Problem(manifold, cost, euclidean_gradient=gradient)
    solver = ConjugateGradient(verbosity=0, max_iterations=300, min_gradient_norm=1e-5)
    start = random_start(n, seed) if start is None else start
    return solver.run(problem, initial_point=start.astype(np.float32)).point


def fastica_pymanopt(y, seed):
    """FastICA, then conjugate gradients from there on the same objective as ours."""
    return pymanopt(y, seed, eps=EPS, start=orthogonalised(fastica(y, seed)))


METHODS = {
    "rotsparse": rotsparse,
    "FastICA": fastica,
    "picard": picard,
    "L4 (MSP)": l4,
    "pymanopt CG": pymanopt,
    "FastICA + pymanopt CG": fastica_pymanopt,
}
