"""Bases from weights, activity and the mean Jacobian alone: strong where gates only switch neurons on and off.

They are baselines that a fit has to beat, and starts for it. All are computed in NumPy, in float64 but for the search
for a sparse basis: at the width of most layers compiling a program would take longer than running it.
"""

import numpy as np
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from rotsparse._core.types import Rows
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.jacobians import LayerStatistics, jacobian_flops
from rotsparse.layers.mlp import Dense
from rotsparse.layers.rotations import Rotations

Matrix = Float[np.ndarray, "_ _"]

# The search for a sparse basis: beyond this width steps take longer, as its cube, and there are fewer.
_STEPS, _WIDTH, _FEWEST_STEPS = 2000, 160, 100
_BATCH = 2048  # rows; fewer find planted bases less often
_EPS = 0.1
_ANGLE = 0.4

# A look at the mean Jacobian of a wide layer may take so many floating-point operations: seconds.
_FLOPS = 1e12


def triangular(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """The basis in which the mean Jacobian is triangular and one side stays as it is: `E[J] = L Q`, `R_in = Q`.

    The rows of Q come from those of `E[J]` by Gram-Schmidt. In a single layer the most active neuron comes first (the
    largest `E[g²]`), and `R_out` sorts the neurons so. Its Jacobian `diag(g) W` is then triangular for *every* example,
    whatever the weights, and has as many exact zeros as any basis with these outputs can have (`most_exact_zeros`). In
    other layers the longest row of `E[J]` comes first. With more outputs than inputs it is the inputs that stay, and
    `R_out` comes from the columns; not so in a single layer, whose outputs are neurons.
    """
    s = statistics or LayerStatistics(layer, x)
    mean = s.jacobian.mean
    single = isinstance(layer, Dense)
    by_columns = not single and layer.d_out > layer.d_in
    rows = mean.T if by_columns else mean
    first = s.gate_powers[0] if single else np.square(rows).sum(axis=1)
    order = np.argsort(-first, kind="stable")
    held, found = np.eye(len(rows))[order], gram_schmidt(rows[order])
    return rounded(held, found) if by_columns else rounded(found, held)


def sparse_weights(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """The bases in which the rows of the input weights and the columns of the output weights are sparse, each scaled
    by how much it matters.

    For `J = L diag(g) M` the rows of M are scaled by `√E[g²]` of their neuron and the norm of its column of L, the
    columns of L by `√E[g²]` and the norm of the row of M. (With several ways in the rows of all count for `R_in`, and
    their energies add up for `R_out`.) `R_in` and `R_out` minimise `Log(0.1)` of these rows, by annealing. The outputs
    of a single layer stay neurons. A norm in front is absorbed into the weights; a skip connection is left out.

    Raises `ValueError` for a layer without weights.
    """
    if not isinstance(layer, ClosedForm):
        raise ValueError(
            f"sparse_weights needs a layer with weights (Dense, MLP or GatedMLP), got {type(layer).__name__}: "
            "triangular works for every layer"
        )
    s = statistics or LayerStatistics(layer, x)
    gated = [np.sqrt(power)[:, None] * absorbed(layer, m) for power, m in zip(s.gate_powers, layer.rights, strict=True)]
    if layer.left is None:
        return rounded(_sparse_basis(gated[0]), np.eye(layer.d_out))
    left = np.asarray(layer.left, np.float64)
    reach = np.linalg.norm(left, axis=0)[:, None]
    energy = sum(np.square(m).sum(axis=1) for m in gated)
    r_in = _sparse_basis(np.concatenate([reach * m for m in gated]))
    return rounded(r_in, _sparse_basis((left * np.sqrt(energy)).T))


def svd_mean_jacobian(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Singular vectors of `E[J]`: they make the mean Jacobian diagonal."""
    s = statistics or LayerStatistics(layer, x)
    return singular_vectors(s.jacobian.mean)


def known_starts(layer: ClosedForm, x: Rows) -> list[Rotations]:
    """The bases that `find_rotations` looks at before it starts: `sparse_weights`, the best start where gates only
    switch neurons, and `svd_mean_jacobian` (of at most 512 evenly spaced examples), the best one where gates hardly
    change."""
    few = int(np.clip(_FLOPS / jacobian_flops(layer), 8, 512))
    return [sparse_weights(layer, x), svd_mean_jacobian(layer, x[:: -(-len(x) // few)])]


def most_exact_zeros(layer: Layer, x: Rows) -> float:
    """The largest share of exact zeros that the Jacobians of a single layer can have with outputs at the neurons,
    whatever `R_in`, if its weights are generic; `triangular` reaches it:

        1 - Σ_k min(k, d_in) p(k) / (d_out d_in)

    with p(1) ≥ p(2) ≥ … the shares of examples on which the neurons are active (`g ≠ 0`), the most active first. It is
    geometry: weights without any structure have these zeros.

    Proof: rotated by `R_in`, k rows of W keep their inner products, which are `Σ_{j≤k} min(j, d_in)` free numbers if
    the rows are generic: so many of their entries at least are not zero. Neuron o adds its nonzero entries to a share
    p(o) of the Jacobians, and with every k rows bounded so, the total is least where the most active neuron has one
    such entry, the next one two, and so on.

    Raises `ValueError` for other layers, and for one with a norm or a skip connection, whose Jacobian is not
    `diag(g) W`.
    """
    if not isinstance(layer, Dense) or layer.norm is not None or layer.skip is not None:
        raise ValueError("the bound holds for a single Dense layer without a norm and a skip connection")
    rates = np.sort(LayerStatistics(layer, x).gate_rates[0])[::-1]
    filled = np.minimum(np.arange(1, layer.d_out + 1), layer.d_in)
    return 1 - float(filled @ rates) / (layer.d_out * layer.d_in)


def rounded(r_in: Float[np.ndarray, "i i"], r_out: Float[np.ndarray, "o o"]) -> Rotations:
    """Both in float32."""
    return Rotations(r_in.astype(np.float32), r_out.astype(np.float32))


def absorbed(layer: ClosedForm, w) -> Float[np.ndarray, "hidden d_in"]:
    """Input weights with the norm in front of them multiplied in."""
    return np.asarray(w if layer.norm is None else layer.norm.absorb(w), np.float64)


def singular_vectors(jacobian: Float[np.ndarray, "d_out d_in"]) -> Rotations:
    """The rotations that make it diagonal, largest entry first."""
    left, _, right = np.linalg.svd(jacobian)
    return rounded(right, left.T)


def gram_schmidt(rows: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "d d"]:
    """An orthonormal basis whose first j rows span the first j of these, completed to all d."""
    return np.linalg.qr(rows.T, mode="complete")[0].T


def few_threads(d: int) -> threadpool_limits:
    """A context for loops over small matrices, where many threads wait for each other far longer than they compute."""
    return threadpool_limits(1 if d <= 512 else None, user_api="blas")


def _sparse_basis(rows: Float[np.ndarray, "k d"]) -> Float[np.ndarray, "d d"]:
    """The rotation R that makes `rows Rᵀ` sparse, by `Log(0.1)`: annealing as in `Anneal`, from the neurons."""
    d = rows.shape[1]
    size = np.sqrt(np.mean(np.square(rows)))
    if size == 0:
        return np.eye(d)
    rows, rng = (rows / size).astype(np.float32), np.random.default_rng(0)
    steps = int(np.clip(_STEPS * (_WIDTH / d) ** 3, _FEWEST_STEPS, _STEPS))
    r = np.eye(d, dtype=np.float32)
    mean, square, probe = np.zeros_like(r), np.zeros_like(r), rng.standard_normal(d).astype(np.float32)
    with few_threads(d):
        for step in range(steps):
            batch = rows if len(rows) <= _BATCH else rows[rng.integers(0, len(rows), _BATCH)]
            z = batch @ r.T
            gradient = (z / (_EPS**2 + np.square(z))).T @ z
            gradient = gradient - gradient.T
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.9 * square + 0.1 * np.square(gradient)
            turn = mean / np.sqrt(square + 1e-12 * square.mean() + np.finfo(np.float32).tiny)
            for _ in range(3):  # power iterations; the last direction is a good first one
                probe = turn.T @ (turn @ probe)
                probe /= max(np.linalg.norm(probe), np.finfo(np.float32).tiny)
            angle = np.float32(_ANGLE * (1 - step / steps))
            r = r - (turn * min(np.float32(1), angle / max(1.1 * np.linalg.norm(turn @ probe), angle))) @ r
            for _ in range(2):
                r = 1.5 * r - 0.5 * (r @ r.T) @ r
    left, _, right = np.linalg.svd(r.astype(np.float64))
    return left @ right
