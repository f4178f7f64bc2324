"""The best angle of every screened pair of rows, and the improvement of the objective at that angle.

A rotation of two rows of R by one angle changes two rows of Z (on the input side, two columns) and nothing else. The
objective along it is a function of one number, which is searched globally: on a grid, then on finer grids around the
best point.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rotsparse._core.orthogonal import matmul
from rotsparse._core.precision import full_precision
from rotsparse.objectives.activation import ActivationSparsity
from rotsparse.objectives.base import Bases, Objective
from rotsparse.objectives.combined import Held
from rotsparse.objectives.jacobian import JacobianSparsity

# Grid of all angles modulo exchange and sign of the two rows (it contains zero), and the number of finer grids, each
# with a quarter of the step.
GRID = np.arange(-16, 16) * (math.pi / 64)
ZOOMS = 3

# Pairs that are turned at once. Fewer waste less on the last block of them, and are slower.
BLOCK = 64

# Pairs of one pass over the examples; more would take much memory.
TOGETHER = 2**14

# Nodes of the interpolation in log(root mean square): exact to float32 for factors up to about 5.
NODES = 13


def obstacle(objective: Objective) -> str | None:
    """Why pair search does not apply to this objective; `None` if it does."""
    while isinstance(objective, Held):
        objective = objective.objective
    if not isinstance(objective, JacobianSparsity | ActivationSparsity):
        return f"pair search needs a JacobianSparsity or an ActivationSparsity, got {type(objective).__name__}"
    if isinstance(objective, JacobianSparsity) and objective.space_in == objective.space_out:
        return "pair search does not apply to a tied fit: a rotation changes rows and columns at once"
    if isinstance(objective, JacobianSparsity) and objective.covariance_out is not None:
        return "pair search does not apply to scaled outputs: two rows do not determine the root mean square of all"
    if not objective.measure.elementwise:
        return f"pair search needs an elementwise measure; {type(objective.measure).__name__} is not"
    return None


def row_entries(objective: Objective) -> int:
    """The number of entries of one row (or of one column, if that is shorter) of an example. Raises `ValueError` if
    `certify` does."""
    rows = sides(objective, {})[0][0].objective
    return min(rows.spaces.values()) if isinstance(rows, JacobianSparsity) else 1


def jacobian_entries(objective: Objective) -> int:
    """The number of entries of an example: d_out · d_in, or d."""
    while isinstance(objective, Held):
        objective = objective.objective
    return math.prod(objective.spaces.values())


class Side(eqx.Module):
    """One space of an objective, seen as rows: the objective is `E mean_k mean S(rows_k)` over the directions k."""

    objective: JacobianSparsity | ActivationSparsity
    space: str = eqx.field(static=True)
    inputs: bool = eqx.field(static=True)

    @property
    def size(self) -> int:
        return self.objective.spaces[self.space]

    @property
    def coupled(self) -> bool:
        """Whether a rotation rescales its two rows and, through the root mean square, all other rows."""
        return self.inputs and isinstance(self.objective, JacobianSparsity) and self.objective.covariance is not None

    def rows(self, bases: Bases, x: Float[Array, "n k"]) -> Float[Array, "d n m"]:
        """The entries that belong to each direction of the space; not scaled yet, if the side is `coupled`."""
        if isinstance(self.objective, ActivationSparsity):
            return (x @ (bases[self.space] / self.objective.rms).T).T[:, :, None]
        r_in, r_out = bases[self.objective.space_in], bases[self.objective.space_out]
        z = self.objective.layer.jacobian(x, r_in, r_out)
        if not self.coupled:
            z = z * self.objective._scale(r_in)[0]
        return jnp.moveaxis(z, 2 if self.inputs else 1, 0)

    def scales(self, bases: Bases) -> Float[Array, "d"]:
        """The factors by which `rows` must still be multiplied."""
        if not self.coupled:
            return jnp.ones(self.size, self.objective.x.dtype)
        assert isinstance(self.objective, JacobianSparsity)
        return self.objective._scale(bases[self.space])[0]

    def turned_scales(self, bases: Bases, i, j, cos, sin):
        """The scales of rows i and j after a rotation, and the logarithm of the factor by which the scales of all other
        rows change. Computed from `Σ` and `E[JᵀJ]`, restricted to the two rows."""
        if not self.coupled:
            return jnp.ones_like(cos), jnp.ones_like(cos), jnp.zeros_like(cos)
        assert isinstance(self.objective, JacobianSparsity)
        scale, variance, gain, sigma, gram = self.objective._scale(bases[self.space])

        def turned(matrix, diagonal):
            cross = 2 * cos * sin * matrix[i, j]
            a, b = diagonal[i], diagonal[j]
            return cos**2 * a + sin**2 * b + cross, sin**2 * a + cos**2 * b - cross

        (var_i, var_j), (gain_i, gain_j) = turned(sigma, variance), turned(gram, gain)
        change = var_i * gain_i + var_j * gain_j - variance[i] * gain[i] - variance[j] * gain[j]
        log_factor = -0.5 * jnp.log1p(change / jnp.sum(variance * gain))
        unit = scale[0] / jnp.sqrt(variance[0]) * jnp.exp(log_factor)  # one over the root mean square
        return unit * jnp.sqrt(var_i), unit * jnp.sqrt(var_j), log_factor

    def mean(self, chunk_sum):
        """The sum of `chunk_sum` over all examples, divided by the number of entries."""
        objective = self.objective
        with full_precision():  # a certificate is to hold for the objective itself
            total = objective.data.sum(chunk_sum, objective.chunk)
        return total / (len(objective.x) * math.prod(self.objective.spaces.values()))


def sides(objective: Objective, bases: Bases) -> tuple[list[Side], Bases]:
    """The spaces that may be rotated, and the rotations of all spaces. Raises `ValueError` if there is an
    `obstacle`."""
    free = list(objective.spaces)
    while isinstance(objective, Held):
        objective, bases = objective.objective, bases | objective.held
    reason = obstacle(objective)
    if reason is not None:
        raise ValueError(reason)
    assert isinstance(objective, JacobianSparsity | ActivationSparsity)
    first = objective.space_in if isinstance(objective, JacobianSparsity) else objective.space
    return [Side(objective, space, space == first) for space in free], bases


def gains(side: Side, bases: Bases, screen: int | None, rows: np.ndarray | None = None):
    """The screened pairs `[N, 2]`, the best angle of each, and its improvement of the objective. With the mask `rows`,
    only pairs that contain one of these rows."""
    pairs = _screened(None if screen is None else np.array(_overlap(side, bases)), side.size, screen)
    pairs = pairs if rows is None else pairs[rows[pairs].any(axis=1)]
    if not len(pairs):
        return pairs, np.zeros(0), np.zeros(0)
    rest = _others(side, bases) if side.coupled else None
    block = min(BLOCK, side.size)
    most = min(math.comb(side.size, 2), side.size * (screen or side.size), TOGETHER)
    angles, gains = [], []
    for part in np.split(pairs, range(most, len(pairs), most)):
        padded = np.zeros((-(-most // block) * block, 2), int)  # one shape, and so one program, for any number of pairs
        padded[: len(part)] = part
        found = _search(side, bases, jnp.asarray(padded), jnp.asarray(-(-len(part) // block)), block, rest)
        angles.append(np.asarray(found[0])[: len(part)])
        gains.append(np.asarray(found[1])[: len(part)])
    return pairs, np.concatenate(angles), np.concatenate(gains)


def _screened(overlap, d: int, screen: int | None) -> Int[np.ndarray, "N 2"]:
    """All pairs, or those in which one row is among the `screen` rows that overlap most with the other."""
    wanted = np.ones((d, d), bool)
    if screen is not None and screen < d - 1:
        np.fill_diagonal(overlap, -np.inf)
        partners = np.argsort(-overlap, axis=1, kind="stable")[:, :screen]
        wanted[:] = False
        wanted[np.arange(d)[:, None], partners] = True
    return np.argwhere(np.triu(wanted | wanted.T, 1))


@eqx.filter_jit
def _overlap(side: Side, bases: Bases) -> Float[Array, "d d"]:
    """Cosine between the activity patterns of rows, `z²/(z² + ε²)`: near one for large entries, near zero otherwise."""
    scales = side.scales(bases)[:, None, None]

    def chunk_sum(x, weights):
        square = jnp.square(side.rows(bases, x) * scales)
        active = (square / (square + side.objective.measure.eps**2)).reshape(side.size, len(x), -1)
        active = (active * weights[:, None]).reshape(side.size, -1)
        return matmul(active, active.T)

    gram = side.mean(chunk_sum)
    norm = jnp.sqrt(jnp.diagonal(gram)) + jnp.finfo(gram.dtype).tiny
    return gram / norm[:, None] / norm


@eqx.filter_jit
def _search(side: Side, bases: Bases, pairs: Int[Array, "p 2"], blocks: Int[Array, ""], block: int, rest):
    """The best angle of every pair of the first `blocks` blocks, and the decrease of the objective there. The entries
    of a chunk of examples are computed once for all of them."""
    i, j = pairs[:, :1], pairs[:, 1:]

    def objective_at(angles):
        """The part of the objective that depends on the angle, for angles `[p, a]` of each pair."""
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        scale_i, scale_j, log_factor = side.turned_scales(bases, i, j, cos, sin)

        def chunk_sum(x, weights):
            rows = side.rows(bases, x)

            def of_block(k, found):
                part = lambda of: jax.lax.dynamic_slice_in_dim(of, k * block, block)  # noqa: E731
                a, b = rows[part(i)[:, 0]], rows[part(j)[:, 0]]

                def at(turn):
                    cos, sin, scale_i, scale_j = (t[:, None, None] for t in turn)
                    values = side.objective.measure(scale_i * (cos * a + sin * b))
                    values += side.objective.measure(scale_j * (cos * b - sin * a))
                    return jnp.sum(values * weights[:, None], axis=(1, 2))

                values = jax.lax.map(at, tuple(part(of).T for of in (cos, sin, scale_i, scale_j))).T
                return jax.lax.dynamic_update_slice_in_dim(found, values, k * block, axis=0)

            return jax.lax.fori_loop(0, blocks, of_block, jnp.zeros(angles.shape, rows.dtype))

        values = side.mean(chunk_sum)
        return values if rest is None else values + rest(pairs, log_factor)

    def lowest(angles, values):
        return jnp.take_along_axis(angles, jnp.argmin(values, axis=1, keepdims=True), axis=1)

    angles = jnp.broadcast_to(jnp.asarray(GRID, side.objective.x.dtype), (len(pairs), len(GRID)))
    values = objective_at(angles)
    unturned = values[:, len(GRID) // 2]

    def zoom(best, step):
        angles = best + step * jnp.asarray([-3, -2, -1, 0, 1, 2, 3], best.dtype)
        values = objective_at(angles)
        return lowest(angles, values), jnp.min(values, axis=1)

    steps = (GRID[1] - GRID[0]) / 4.0 ** np.arange(1, ZOOMS + 1)
    best, values = jax.lax.scan(zoom, lowest(angles, values), jnp.asarray(steps, angles.dtype))
    return best[:, 0], unturned - values[-1]


class _Others(eqx.Module):
    """The change of the objective over all rows but two if their entries are multiplied by one factor: for each row a
    polynomial in the logarithm of the factor, by Chebyshev interpolation on `[-reach, reach]`."""

    coefficients: Float[Array, "d nodes"]
    reach: Float[Array, ""]

    def __call__(self, pairs, log_factor):
        share = jnp.sum(self.coefficients, axis=0) - self.coefficients[pairs[:, 0]] - self.coefficients[pairs[:, 1]]
        return jnp.sum(share[:, None] * (self.basis(log_factor) - self.basis(jnp.zeros(()))), axis=-1)

    def basis(self, log_factor):
        angle = jnp.arccos(jnp.clip(log_factor / self.reach, -1, 1))
        return jnp.cos(angle[..., None] * jnp.arange(NODES))


@eqx.filter_jit
def _others(side: Side, bases: Bases) -> _Others:
    d, dtype = side.size, side.objective.x.dtype
    i, j = jnp.arange(d)[:, None], jnp.arange(d)[None]

    def largest(angle):
        log_factor = side.turned_scales(bases, i, j, jnp.cos(angle), jnp.sin(angle))[2]
        return jnp.max(jnp.where(i == j, 0, jnp.abs(log_factor)))

    # The margins 1.1 and 0.001 cover angles between grid points, and scales that do not change at all.
    reach = 1.1 * jnp.max(jax.lax.map(largest, jnp.asarray(GRID, dtype))) + 1e-3
    nodes = np.cos(np.pi * (np.arange(NODES) + 0.5) / NODES)
    factors = jnp.exp(reach * jnp.asarray(nodes, dtype))
    scales = side.scales(bases)[:, None, None]

    def chunk_sum(x, weights):
        z = side.rows(bases, x) * scales
        at = lambda factor: jnp.sum(side.objective.measure(factor * z) * weights[:, None], axis=(1, 2))  # noqa: E731
        return jax.lax.map(at, factors).T

    interpolation = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, NODES - 1))
    return _Others(matmul(side.mean(chunk_sum), jnp.asarray(interpolation.T, dtype)), reach)
