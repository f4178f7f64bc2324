"""A random submatrix of each Jacobian, which gives an unbiased estimate of the objective."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from rotsparse.objectives.measures import Measure


class Submatrix(eqx.Module):
    """Some rows and columns of Z, drawn uniformly without replacement: an unbiased estimate for elementwise measures.

    The value is the mean over fewer entries. The relative gradient needs `E[G Zᵀ]` at pairs of rows (o, p), which are
    both drawn with probability `s(s-1)/(d(d-1))`, and `E[Gᵀ Z]` at pairs of columns likewise (also on the diagonal,
    with probability t/d, if inputs are scaled). Each entry is divided by its probability; entries of rows or columns
    that were not drawn are zero. So a step turns only the drawn directions among each other, and its cost falls with
    the number of entries drawn.
    """

    rows: Int[Array, "s"]
    columns: Int[Array, "t"]

    @classmethod
    def draw(cls, key: PRNGKeyArray, size: tuple[int, int], shape: tuple[int, int], measure: Measure) -> "Submatrix":
        """Draw `size` rows and columns of Jacobians of this shape (all, if it has fewer). Raises `ValueError` for sizes
        below two, and for a measure that is not elementwise."""
        if len(size) != 2 or not all(n >= 2 for n in size):
            raise ValueError(f"submatrix is how many rows and columns a step sees, at least two of each, got {size}")
        if not measure.elementwise:
            raise ValueError(f"a submatrix needs an elementwise measure, and {type(measure).__name__} is not")
        keys = jax.random.split(jax.random.fold_in(key, 1))
        counts = (min(n, d) for n, d in zip(size, shape, strict=True))
        return cls(*(jax.random.choice(k, d, (n,), replace=False) for k, n, d in zip(keys, counts, shape, strict=True)))

    def select(self, r_in, r_out, column_scale):
        column_scale = jnp.broadcast_to(column_scale, r_in.shape[:1])
        return r_in[self.columns], r_out[self.rows], column_scale[self.columns]

    def spread(self, h_out, h_in, shape: tuple[int, int]):
        """Unbiased estimates of `E[G Zᵀ]` and `E[Gᵀ Z]` from those of the drawn submatrix, which are divided by its own
        number of entries."""

        def spread(h, at, d):
            # The mean over the other side is unbiased already; only the probability of the pair remains.
            drawn = len(at)
            chance = jnp.full_like(h, (drawn - 1) / (d - 1))
            chance = jnp.where(jnp.eye(drawn, dtype=bool), 1.0, chance)
            return jnp.zeros((d, d), h.dtype).at[at[:, None], at].set(h / chance)

        return spread(h_out, self.rows, shape[0]), spread(h_in, self.columns, shape[1])
