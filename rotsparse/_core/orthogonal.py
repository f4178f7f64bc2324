"""The orthogonal group: tangent directions, projections onto it, and steps along it.

The hot path uses matrix products only (Newton-Schulz), because SVD and QR are slow on accelerators and `expm` is slow
to compile. Every product has full float32 precision: a matrix computed in tf32 or bf16 is orthogonal to only three
digits, and folding it would change the function.
"""

from collections.abc import Callable, Mapping
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from rotsparse._core.types import AnyArray

_HIGHEST = jax.lax.Precision.HIGHEST

# From this width on, products of d×d matrices take most of the time of a step on few examples, and `turn` saves them.
WIDE = 256

# A retraction maps (R, Omega) -> a rotation near expm(Omega) R, for skew-symmetric Omega.
Retraction = Callable[[Float[Array, "d d"], Float[Array, "d d"]], Float[Array, "d d"]]


@overload
def matmul(a: Array, b: AnyArray) -> Array: ...
@overload
def matmul(a: AnyArray, b: Array) -> Array: ...
@overload
def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray: ...
def matmul(a: AnyArray, b: AnyArray) -> AnyArray:
    """`a @ b` in full precision on every backend. Two NumPy arrays give a NumPy array, so float64 needs no
    `jax_enable_x64`."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a @ b
    return jnp.matmul(a, b, precision=_HIGHEST)


def skew(a: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """Skew-symmetric part `(A - Aᵀ)/2`: the tangent space of the orthogonal group at the identity."""
    return 0.5 * (a - jnp.swapaxes(a, -1, -2))


def orthogonality_error(r: Float[Array, "*b k d"]) -> Float[Array, "*b"]:
    """Largest absolute entry of `R Rᵀ - I`."""
    gram = matmul(r, jnp.swapaxes(r, -1, -2))
    return jnp.max(jnp.abs(gram - jnp.eye(r.shape[-2], dtype=r.dtype)), axis=(-1, -2))


def exact_error(r) -> float:
    """`orthogonality_error` of one matrix, computed on the host in float64."""
    r = np.asarray(r, np.float64)
    return float(np.abs(r @ r.T - np.eye(len(r))).max())


def worst_error(bases: Mapping[str, Float[Array, "*b k d"]]) -> float:
    """Largest absolute entry of `R Rᵀ - I` over the rotations of all spaces."""
    return max(float(jnp.max(orthogonality_error(r))) for r in bases.values())


def haar(key: PRNGKeyArray, d: int, dtype=jnp.float32) -> Float[Array, "d d"]:
    """A uniformly random orthogonal matrix (Haar measure on O(d)): the sign-corrected QR factor of a Gaussian
    matrix (Mezzadri, "How to generate random matrices from the classical compact groups", 2007)."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (d, d), dtype))
    return q * jnp.sign(jnp.diagonal(r))


def newton_schulz(a: Float[Array, "d d"], iterations: int) -> Float[Array, "d d"]:
    """Cubic Newton-Schulz iteration `X <- 1.5 X - 0.5 X Xᵀ X` towards the polar factor of `A`.

    Converges, quadratically near the end, when all singular values of `A` lie in (0, √3); an error e in a
    singular value becomes about 1.5 e². (Björck & Bowie 1971; Higham, "Functions of Matrices", ch. 8.)
    """
    for _ in range(iterations):
        a = 1.5 * a - 0.5 * matmul(matmul(a, a.T), a)
    return a


def polar(a: Float[Array, "d d"], max_iterations: int = 60) -> Float[Array, "d d"]:
    """Orthogonal polar factor `A (AᵀA)^(-1/2)`, the orthogonal matrix nearest to `A`, from any non-singular `A`.

    The matrix is first divided by an upper bound of its spectral norm, so that Newton-Schulz converges from
    anywhere; it stops when the iterate is orthogonal to working precision. Singular values below about
    `1.5^-max_iterations` of the largest are not resolved.
    """
    a = a / spectral_norm_bound(a)
    d = a.shape[-1]
    tolerance = 8 * jnp.finfo(a.dtype).eps * jnp.sqrt(d)

    def unfinished(state):
        _, gram, i = state
        return (i < max_iterations) & (jnp.max(jnp.abs(gram - jnp.eye(d, dtype=a.dtype))) > tolerance)

    def body(state):
        x, gram, i = state
        x = 1.5 * x - 0.5 * matmul(gram, x)
        return x, matmul(x, x.T), i + 1

    return jax.lax.while_loop(unfinished, body, (a, matmul(a, a.T), 0))[0]


def spectral_norm_bound(a: Float[Array, "d d"]) -> Float[Array, ""]:
    """A guaranteed upper bound of the largest singular value, at most `d^(1/16)` times too large.

    `‖A‖₂ ≤ ‖(AᵀA)⁴‖_F^(1/8)`: two squarings of the Gram matrix. Unlike power iteration it can never be too
    small, so a step divided by it can never leave the region where Newton-Schulz converges.
    """
    tiny = jnp.finfo(a.dtype).tiny
    # Two scalings keep the eighth power inside float32's range.
    scale = jnp.maximum(jnp.max(jnp.abs(a)), tiny)
    a = a / scale
    gram = matmul(a.T, a)
    frobenius = jnp.maximum(jnp.linalg.norm(gram), tiny)
    # A loop, because XLA fuses a chain of products that ends in a norm into a loop that is 30 times slower at d = 2048.
    eighth = jax.lax.fori_loop(0, 2, lambda _, power: matmul(power, power), gram / frobenius)
    return scale * jnp.sqrt(frobenius) * jnp.maximum(jnp.linalg.norm(eighth), tiny) ** 0.125


def skew_norm(a: Float[Array, "d d"]) -> Float[Array, ""]:
    """The largest singular value of a skew-symmetric matrix by six power steps on eight fixed random vectors: `96·d²`
    flops, no d×d product.

    Never too large, and for directions with Gaussian entries 7% (d = 576) to 10% (d = 2048) too small. It is not a
    bound: use it where a step that is half as long again does no harm.
    """
    probes = jax.random.normal(jax.random.key(0), (a.shape[-1], 8), a.dtype)
    tiny = jnp.finfo(a.dtype).tiny

    def power(_, state):
        probes, _ = state
        turned = matmul(a, probes)
        norms = jnp.maximum(jnp.linalg.norm(turned, axis=0), tiny)
        return turned / norms, jnp.max(norms)

    probes = probes / jnp.linalg.norm(probes, axis=0)
    return jax.lax.fori_loop(0, 6, power, (probes, jnp.zeros((), a.dtype)))[1]


def bound_step(omega: Float[Array, "d d"], limit: float | Array) -> Float[Array, "d d"]:
    """Scale a tangent step so that its spectral norm (the largest angle turned, in radians) is at most `limit`."""
    return omega * jnp.minimum(1.0, limit / spectral_norm_bound(omega))


# What makes `skew_norm` as large as `spectral_norm_bound`, for which the angles of all methods were set: of directions
# with Gaussian entries they are 0.91 and 1.13 (d = 256) to 0.93 and 1.21 (d = 768) times the norm. Without it
# `find_basis` of 10,000 rows of d = 576 ends 3% higher.
_AS_BOUND = 1.25


def turn(r: Float[Array, "d d"], direction: Float[Array, "d d"], angle: Float[Array, ""]) -> Float[Array, "d d"]:
    """`polar((I - Ω) R)`, where Ω is the skew-symmetric `direction`, shortened so that it turns its fastest plane by at
    most `angle` ≤ 0.5 radians.

    Narrow spaces take ten products: a bound of `‖Ω‖₂` that can never be too small, and three Newton-Schulz steps. From
    `WIDE` on it takes three to seven: `skew_norm`, a quarter larger, and as many Newton-Schulz steps as the angle
    needs. `(I - Ω)R` has singular values of at most `√(1 + a²)`, a the angle, and k steps leave an error of about
    `0.375 a⁴` (k = 1), `0.21 a⁸` (2) or `0.066 a¹⁶` (3): at most 3e-5, and that of float32 where the angle ends.
    """
    if len(r) < WIDE:
        return newton_schulz(r - matmul(bound_step(direction, angle), r), 3)
    tiny = jnp.finfo(r.dtype).tiny
    omega = direction * jnp.minimum(1.0, angle / jnp.maximum(_AS_BOUND * skew_norm(direction), tiny))
    count = 1 + (angle > 0.05).astype(int) + (angle > 0.3).astype(int)
    return jax.lax.fori_loop(0, count, lambda _, x: newton_schulz(x, 1), r - matmul(omega, r))


# --- retractions ------------------------------------------------------------------------------------------------


def retract_polar(r: Float[Array, "d d"], omega: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`polar((I + Ω) R)` by four Newton-Schulz steps; second order (it agrees with `expm(Ω) R` to O(‖Ω‖³)).

    `(I + Ω)` has singular values `√(1 + ω²)`: for steps of at most 0.5 rad, four iterations end below 1e-11, and
    the same iterations pull any rounding drift of `R` back onto the group.
    """
    return newton_schulz(r + matmul(omega, r), 4)


def retract_cayley(r: Float[Array, "d d"], omega: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Cayley transform `(I - Ω/2)⁻¹ (I + Ω/2) R`: second order, exactly orthogonal for any skew Ω (one solve)."""
    eye = jnp.eye(r.shape[-1], dtype=r.dtype)
    return newton_schulz(jnp.linalg.solve(eye - 0.5 * omega, r + 0.5 * matmul(omega, r)), 1)


def retract_qr(r: Float[Array, "d d"], omega: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """`qf((I + Ω) R)` with the sign of R's diagonal made positive: a first-order retraction."""
    # The QR factor is taken of (I + Ω) alone: qf(I + Ω) R is a retraction too, and its signs are well defined.
    q, upper = jnp.linalg.qr(jnp.eye(r.shape[-1], dtype=r.dtype) + omega)
    return newton_schulz(matmul(q * jnp.sign(jnp.diagonal(upper)), r), 1)


def retract_expm(r: Float[Array, "d d"], omega: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """The geodesic `expm(Ω) R`. Exact, but slow to compile and about seven matrix products: for reference."""
    return newton_schulz(matmul(jax.scipy.linalg.expm(omega), r), 1)


# --- parametrizations: any square (or skew) matrix -> an orthogonal one ---------------------------------------


def cayley(a: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Orthogonal matrix `(I - S/2)⁻¹(I + S/2)`, `S = skew(A)`. Never has the eigenvalue -1."""
    return retract_cayley(jnp.eye(a.shape[-1], dtype=a.dtype), skew(a))


def expm(a: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Orthogonal matrix `expm(skew(A))`; covers all of SO(d)."""
    return retract_expm(jnp.eye(a.shape[-1], dtype=a.dtype), skew(a))


def qr(a: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """Orthogonal factor of `A = QR` with a positive diagonal of the triangular factor."""
    q, upper = jnp.linalg.qr(a)
    return q * jnp.sign(jnp.diagonal(upper))
