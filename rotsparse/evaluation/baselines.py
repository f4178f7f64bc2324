"""Baselines: rotations that ignore the sparsity objective. A learned basis has to beat every one of them.

Each takes a layer and its inputs `x` and returns `Rotations`, computed in float64 on the host and rounded to float32
once. Rows are sorted by what the method orders them by (variance, singular value), largest first. The statistics of
the layer can be shared between calls: `pca(layer, x, statistics=LayerStatistics(layer, x))`; `all_baselines` does so.
"""

import logging
import math
import warnings
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core.intervals import numpy_generator
from rotsparse._core.orthogonal import WIDE
from rotsparse._core.types import Rows
from rotsparse.fit.weight_bases import absorbed, few_threads, rounded, singular_vectors
from rotsparse.fit.weight_bases import most_exact_zeros as most_exact_zeros
from rotsparse.fit.weight_bases import sparse_weights as sparse_weights
from rotsparse.fit.weight_bases import svd_mean_jacobian as svd_mean_jacobian
from rotsparse.fit.weight_bases import triangular as triangular
from rotsparse.layers.base import ClosedForm, Layer
from rotsparse.layers.jacobians import LayerStatistics, apply
from rotsparse.layers.rotations import Rotations

Matrix = Float[np.ndarray, "_ _"]

# Directions with less than this share of the largest variance hold rounding noise, which whitening would blow up.
_RELATIVE_VARIANCE = 1e-6
# Enough for stable components, and FastICA's time grows with it.
_ICA_EXAMPLES = 10_000
_ICA_ITERATIONS, _FEWEST_ICA_ITERATIONS = 200, 50
_VARIMAX_ITERATIONS = 1000
_VARIMAX_TOLERANCE = 1e-7  # the least relative gain of a step

_log = logging.getLogger(__name__)


def neurons(layer: Layer, x: Rows) -> Rotations:
    """The identity: the basis that the network was trained in."""
    return rounded(np.eye(layer.d_in), np.eye(layer.d_out))


def haar(layer: Layer, x: Rows, *, key: PRNGKeyArray) -> Rotations:
    """Uniformly random rotations, as `orthogonal.haar` but in float64: what no structure at all gives."""
    rng = numpy_generator(key)
    return rounded(*(_positive_qr(rng.standard_normal((d, d))) for d in (layer.d_in, layer.d_out)))


def pca(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Principal axes of the inputs and of the outputs: eigenvectors of their covariances."""
    s = statistics or LayerStatistics(layer, x)
    return rounded(_eigenvectors(s.inputs[1]), _eigenvectors(s.outputs[1]))


def pca_uncentred(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Eigenvectors of the second moments `E[xxᵀ]` and `E[yyᵀ]`, mean included: the rotation of LaRoSA (Liu et al.,
    "La RoSA: Enhancing LLM Efficiency via Layerwise Rotated Sparse Activation", 2025)."""
    s = statistics or LayerStatistics(layer, x)
    return rounded(*(_eigenvectors(cov + np.outer(mean, mean)) for mean, cov in (s.inputs, s.outputs)))


def svd_weights(layer: Layer, x: Rows) -> Rotations:
    """Singular vectors of the weights alone.

    For `y = W_out φ(W_in x)` those of `W_out W_in` (of `W` for a single layer): the Jacobian with every gate open. A
    gated block has two ways in, whose relative sign and scale mean nothing (`W_up → -W_up, W_down → -W_down` is the
    same function), so their sum is not a product to decompose: its input directions are the right singular vectors of
    the stacked `[W_gate; W_up]`, its output directions the left ones of `W_down`. A norm in front is absorbed into
    the weights; a skip connection is left out, since the identity favours no direction.

    Raises `ValueError` for a layer without weights.
    """
    if not isinstance(layer, ClosedForm):
        raise ValueError(
            f"svd_weights needs a layer with weights (Dense, MLP or GatedMLP), got {type(layer).__name__}: "
            "svd_mean_jacobian works for every layer"
        )
    left = None if layer.left is None else np.asarray(layer.left, np.float64)
    rights = [absorbed(layer, w) for w in layer.rights]
    if len(rights) == 1:
        return singular_vectors(rights[0] if left is None else left @ rights[0])
    assert left is not None
    return rounded(np.linalg.svd(np.concatenate(rights))[2], np.linalg.svd(left)[0].T)


def svd_mean_jacobian_weighted(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Singular vectors of `E[J] Σ^½`, with Σ the covariance of the inputs: which of the directions that *occur* matter.

    With `E[J] Σ^½ = U S Vᵀ` the output directions are U's columns, the eigenvectors of `E[J] Σ E[J]ᵀ`. The input
    coordinates that make the mean Jacobian diagonal, `VᵀΣ^(-½) x`, are not orthogonal, and neither are the directions
    `Σ^½ V` that excite them; but with the symmetric root the orthogonal matrix nearest to either is the same, Vᵀ
    itself (the polar factor of an orthogonal times a positive matrix is that orthogonal matrix). So `R_in = Vᵀ`: no
    choice is left to make.
    """
    s = statistics or LayerStatistics(layer, x)
    variances, axes = np.linalg.eigh(s.inputs[1])
    root = (axes * np.sqrt(np.maximum(variances, 0))) @ axes.T
    return singular_vectors(s.jacobian.mean @ root)


def jacobian_gram(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Eigenvectors of `E[JᵀJ]` and `E[JJᵀ]`: PCA of the Jacobian's rows and columns. (`E[JᵀJ]` of a scalar function
    is the matrix of active subspaces: Constantine, Dow & Wang 2014.)"""
    s = statistics or LayerStatistics(layer, x)
    return rounded(_eigenvectors(s.jacobian.gram_in), _eigenvectors(s.jacobian.gram_out))


def ica(layer: Layer, x: Rows, *, seed: int, statistics: LayerStatistics | None = None) -> Rotations:
    """Independent components of the inputs and of the outputs (FastICA: Hyvärinen & Oja 2000; scikit-learn's, logcosh).

    ICA whitens with `Λ^(-½) P` (P: principal axes) and finds an orthogonal W there. Its unmixing matrix `W Λ^(-½) P =
    (W Λ^(-½) Wᵀ) W P` is a positive matrix times `W P`, so `W P` is the orthogonal matrix nearest to it, and to the
    transposed mixing matrix as well: that is the rotation. Directions with less than 1e-6 of the largest variance
    stay principal axes.

    At most 10,000 examples are used, drawn by `seed`. FastICA that has not converged after 200 iterations is used as
    it is (an orthogonal matrix all the same), with a message at level INFO of this module's logger.
    """
    s = statistics or LayerStatistics(layer, x)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(s.x))[:_ICA_EXAMPLES])
    sample = s.x[chosen]
    return rounded(
        _independent_components(np.asarray(sample, np.float64), s.inputs, rng, "inputs"),
        _independent_components(np.asarray(apply(layer, sample), np.float64), s.outputs, rng, "outputs"),
    )


def varimax(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Principal axes of the inputs and of the outputs, turned to simple structure (Kaiser, "The Varimax Criterion for
    Analytic Rotation in Factor Analysis", 1958).

    As usual in factor analysis, the factors with more than the average variance are kept (the Kaiser-Guttman rule),
    their loadings are scaled to unit communality ("normal" varimax) and rotated; the other directions stay principal
    axes. (With all factors kept, simple structure would be trivial: loadings of whitened data rotate into the
    identity.)
    """
    s = statistics or LayerStatistics(layer, x)
    return rounded(_varimax_axes(s.inputs[1]), _varimax_axes(s.outputs[1]))


def svd_varimax(layer: Layer, x: Rows, *, statistics: LayerStatistics | None = None) -> Rotations:
    """Singular vectors of `E[J]`, scaled by their singular values and turned to simple structure as in `varimax`."""
    s = statistics or LayerStatistics(layer, x)
    mean = s.jacobian.mean
    return rounded(_varimax_axes(mean.T @ mean), _varimax_axes(mean @ mean.T))


def hadamard(layer: Layer, x: Rows) -> Rotations:
    """Hadamard rotations, which spread every neuron evenly over all directions: the opposite of sparse, used against
    outliers in quantisation.

    A Sylvester-Hadamard matrix where d is a power of two. Otherwise `d = 2^k m` with m odd, and the matrix is the
    Kronecker product of the Hadamard matrix of size `2^k` and the discrete Hartley transform `cas(2πij/m)/√m` of size
    m: orthogonal, symmetric, no entry larger than `√(2/d)`.
    """
    return rounded(_hadamard(layer.d_in), _hadamard(layer.d_out))


def all_baselines(
    layer: Layer, x: Rows, *, key: PRNGKeyArray, shown: Callable[[str], None] = lambda name: None
) -> dict[str, Rotations]:
    """Every baseline by name, with statistics shared. `svd_weights` and `sparse_weights` are left out for a layer
    without weights.

    `key` draws the Haar rotations and seeds ICA; `shown` is told which comes next. Raises `ValueError` for unusable
    `x`.
    """
    statistics, found = LayerStatistics(layer, x), {}
    for name, compute in methods(layer, key=key).items():
        shown(name)
        found[name] = compute(statistics)
    return found


def methods(layer: Layer, *, key: PRNGKeyArray) -> dict[str, Callable[[LayerStatistics], Rotations]]:
    """The baselines of `all_baselines`, not yet computed: functions of the layer's statistics."""
    key_haar, key_ica = jax.random.split(key)
    seed = int(jax.random.bits(key_ica, (), "uint32"))
    found: dict[str, Callable[[LayerStatistics], Rotations]] = {
        "neurons": lambda s: neurons(layer, s.x),
        "haar": lambda s: haar(layer, s.x, key=key_haar),
        "pca": lambda s: pca(layer, s.x, statistics=s),
        "pca_uncentred": lambda s: pca_uncentred(layer, s.x, statistics=s),
    }
    if isinstance(layer, ClosedForm):
        found["svd_weights"] = lambda s: svd_weights(layer, s.x)
        found["sparse_weights"] = lambda s: sparse_weights(layer, s.x, statistics=s)
    return found | {
        "svd_mean_jacobian": lambda s: svd_mean_jacobian(layer, s.x, statistics=s),
        "svd_mean_jacobian_weighted": lambda s: svd_mean_jacobian_weighted(layer, s.x, statistics=s),
        "svd_varimax": lambda s: svd_varimax(layer, s.x, statistics=s),
        "triangular": lambda s: triangular(layer, s.x, statistics=s),
        "jacobian_gram": lambda s: jacobian_gram(layer, s.x, statistics=s),
        "ica": lambda s: ica(layer, s.x, seed=seed, statistics=s),
        "varimax": lambda s: varimax(layer, s.x, statistics=s),
        "hadamard": lambda s: hadamard(layer, s.x),
    }


# --- the linear algebra, in float64 -----------------------------------------------------------------------------


def _eigenvectors(symmetric: Matrix) -> Matrix:
    """Eigenvectors as rows, largest eigenvalue first."""
    return np.linalg.eigh(symmetric)[1].T[::-1]


def _positive_qr(gaussian: Matrix) -> Matrix:
    q, upper = np.linalg.qr(gaussian)
    return q * np.sign(np.diagonal(upper))


def _polar(a: Matrix) -> Matrix:
    left, _, right = np.linalg.svd(a)
    return left @ right


def _independent_components(v: Float[np.ndarray, "n d"], moments, rng: np.random.Generator, side: str) -> Matrix:
    # Imported where it is used: scikit-learn takes longer to import than everything else here together.
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    mean, cov = moments
    axes = _eigenvectors(cov)
    variances = np.einsum("id,de,ie->i", axes, cov, axes, optimize=True)
    varying = variances > _RELATIVE_VARIANCE * variances[0]
    kept = axes[varying]
    if len(kept) < 2:
        return axes
    whitened = ((v - mean) @ kept.T) / np.sqrt(variances[varying])
    start = _positive_qr(rng.standard_normal((len(kept), len(kept))))
    # An iteration costs an eigendecomposition, which takes seconds in the widest spaces.
    iterations = int(np.clip(_ICA_ITERATIONS * (WIDE / len(kept)) ** 3, _FEWEST_ICA_ITERATIONS, _ICA_ITERATIONS))
    fast_ica = FastICA(whiten=False, w_init=start, max_iter=iterations)  # pyright: ignore[reportArgumentType]
    with few_threads(len(kept)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        try:
            components = fast_ica.fit(whitened).components_
        except np.linalg.LinAlgError:
            # With few examples a dimension its iterates can overflow. The baseline is then what it started from.
            _log.warning("FastICA of the %s diverged (few examples for %d directions); PCA stands in", side, len(kept))
            return axes
    if any(issubclass(w.category, ConvergenceWarning) for w in caught):
        _log.info("FastICA of the %s has not converged after %d iterations; it is used as it is", side, iterations)
    return np.concatenate([_polar(components) @ kept, axes[~varying]])


def _varimax_axes(cov: Matrix) -> Matrix:
    variances, vectors = np.linalg.eigh(cov)
    variances, axes = np.maximum(variances[::-1], 0), vectors.T[::-1]
    kept = int(np.count_nonzero(variances > variances.mean()))
    if kept < 2:
        return axes
    loadings = axes[:kept].T * np.sqrt(variances[:kept])
    communality = np.linalg.norm(loadings, axis=1, keepdims=True)
    turn = _varimax(loadings / np.where(communality > 0, communality, 1))
    return np.concatenate([turn.T @ axes[:kept], axes[kept:]])


def _varimax(loadings: Float[np.ndarray, "d k"]) -> Float[np.ndarray, "k k"]:
    """The orthogonal T that maximises `V(T) = Σ_j Var_i(B_ij²)`, `B = A T` (a local maximum, from `T = I`).

    `T ← polar(G + αT)` with `G = Aᵀ(B³ - B diag(mean_i B²)) = d/4 ∇V`. On the orthogonal matrices `α/2 ‖T‖²` is a
    constant; with `α = 3 ‖A‖₂⁴/d` it makes `d/4 V` convex, so that it lies above its linearisation and every step goes
    up. A smaller α takes longer steps, and none at all can cycle: α starts small and grows whenever a step goes down.
    """
    bound = 3 * np.linalg.norm(loadings, 2) ** 4 / len(loadings)
    shift = 0.01 * bound
    turn, turned = np.eye(loadings.shape[1]), loadings
    reached = np.square(turned).var(axis=0).sum()
    with few_threads(len(turn)):
        for _ in range(_VARIMAX_ITERATIONS):
            square = np.square(turned)
            step = _polar(loadings.T @ (turned * (square - square.mean(axis=0))) + shift * turn)
            value = np.square(loadings @ step).var(axis=0).sum()
            if value < reached and shift < bound:
                shift = min(4 * shift, bound)
                continue
            gain, reached = value - reached, value
            turn, turned = step, loadings @ step
            if gain <= _VARIMAX_TOLERANCE * reached:
                break
    return turn


def _hadamard(d: int) -> Matrix:
    odd, sylvester = d, np.ones((1, 1))
    while odd % 2 == 0:
        odd, sylvester = odd // 2, np.kron([[1, 1], [1, -1]], sylvester) / math.sqrt(2)
    angle = 2 * math.pi / odd * np.outer(np.arange(odd), np.arange(odd))
    hartley = (np.cos(angle) + np.sin(angle)) / math.sqrt(odd)
    return np.kron(sylvester, hartley)
