"""A random part of each Jacobian: some rows and columns, which make an unbiased estimate of the whole objective."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray


class Part(eqx.Module):
    """Some rows and columns of Z, drawn uniformly without replacement: an unbiased view of an elementwise objective.

    The value is the mean over fewer entries. The relative gradient needs `E[G Zᵀ]` at pairs of rows (o, p), which are
    both drawn with probability `s(s-1)/(d(d-1))`, and `E[Gᵀ Z]` likewise at pairs of columns (the diagonal, with
    probability t/d, counts where inputs are scaled): every entry is divided by its probability, and those of rows or
    columns that were not drawn are zero. A step therefore turns the drawn directions among each other only, and needs
    no other part of Z: the cost falls with the number of entries drawn.
    """

    rows: Int[Array, "s"]
    columns: Int[Array, "t"]

    @classmethod
    def draw(cls, key: PRNGKeyArray, part: tuple[int, int], shape: tuple[int, int]) -> "Part":
        keys = jax.random.split(jax.random.fold_in(key, 1))
        return cls(*(jax.random.choice(k, d, (n,), replace=False) for k, n, d in zip(keys, part, shape, strict=True)))

    def select(self, r_in, r_out, column_scale):
        column_scale = jnp.broadcast_to(column_scale, r_in.shape[:1])
        return r_in[self.columns], r_out[self.rows], column_scale[self.columns]

    def spread(self, h_out, h_in, shape: tuple[int, int]):
        """`E[G Zᵀ]` and `E[Gᵀ Z]` of the drawn part, both over its own number of entries, as unbiased estimates of the
        whole ones."""

        def spread(h, at, d):
            # Its entries' mean over the other side is unbiased already; what is left is the chance of a pair.
            drawn = len(at)
            chance = jnp.full_like(h, (drawn - 1) / (d - 1))
            chance = jnp.where(jnp.eye(drawn, dtype=bool), 1.0, chance)
            return jnp.zeros((d, d), h.dtype).at[at[:, None], at].set(h / chance)

        return spread(h_out, self.rows, shape[0]), spread(h_in, self.columns, shape[1])


def check_part(part, layer, measure):
    if part is None:
        return None
    shape = (layer.d_out, layer.d_in)
    if len(part) != 2 or not all(2 <= n <= d for n, d in zip(part, shape, strict=True)):
        raise ValueError(f"part is how many of the {shape[0]} rows and {shape[1]} columns a step sees, got {part}")
    if not measure.elementwise:
        raise ValueError(f"parts of the Jacobian need an elementwise measure, and {type(measure).__name__} is none")
    return (int(part[0]), int(part[1]))
