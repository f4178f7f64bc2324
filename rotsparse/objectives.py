"""Objectives: what is minimised over the rotations.

An *activation space* (the input of a layer, its output, the residual stream) has a name and one rotation. An objective
is a function of the rotations of some spaces, here called `bases`: a dictionary from the name of a space to its
orthogonal matrix. `JacobianSparsity` connects two spaces, possibly the same one (a tied fit); `ActivationSparsity`
looks at one; `WeightedSum` adds them up, and that is all a chain of layers needs.

The gradient is the *relative* one: the skew-symmetric `Γ` with `F(expm(Ω) R) = F(R) + <Γ, Ω> + O(Ω²)`. For
`Z = R_out J R_inᵀ` and `G = ∂F/∂Z` it is `Γ_out = skew(E[G Zᵀ])`, `Γ_in = skew(E[Gᵀ Z])`: it needs Z itself and nothing
else of the layer, so every layer has a closed-form gradient, nothing of size [n, d_out, d_in] is kept (each chunk's Z
is made, used and forgotten), and for an MLP block with d_hidden = 4 d the gradient costs a third of what
backpropagation through `(R_out L) diag(g) (M R_inᵀ)` would.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse import checks
from rotsparse.checks import Data
from rotsparse.layers import Layer, Subspace
from rotsparse.measures import Measure, with_eps
from rotsparse.orthogonal import matmul, skew
from rotsparse.sharding import EXAMPLES, Devices
from rotsparse.sources import ArrayRows, Source, in_memory
from rotsparse.statistics import Moments, chunk_size, jacobian_gram, stream_moments

Bases = dict[str, Float[Array, "d d"]]

# Variances below this fraction of the mean variance count as this much: the square root of zero has no gradient.
VARIANCE_FLOOR = 1e-6

# Memory for the per-example arrays of one chunk. Larger chunks are no faster: this keeps a core's matrix products busy
# and the intermediate results near the cache.
CHUNK_BYTES = 8 * 2**20


class Objective(eqx.Module):
    """A function of the rotations of some spaces, with its relative gradient."""

    @property
    @abc.abstractmethod
    def spaces(self) -> dict[str, int]:
        """Name and dimension of every space whose rotation this objective depends on."""

    @abc.abstractmethod
    def value_and_grad(self, bases: Bases) -> tuple[Float[Array, ""], Bases]:
        """The objective and the relative gradient (one skew-symmetric matrix for every space)."""

    @abc.abstractmethod
    def value(self, bases: Bases) -> Float[Array, ""]:
        """The objective."""

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray, fetched: Any = None) -> "Objective":
        """The same objective on a random minibatch of its examples (drawn with replacement, so both value and gradient
        are unbiased), or itself when it has no batch size. `fetched` are the examples that belong to this key, where
        `fetching` has read them."""

    @property
    def fetched_bytes(self) -> int:
        """What `fetching` reads for one step of one restart: nothing unless a subclass says otherwise."""
        return 0

    def fetching(self, keys: PRNGKeyArray, devices: Devices) -> Callable[[], Any]:
        """A function that reads the examples that `sample` takes with each of these keys, `[restarts, steps]`. It may
        run in any thread."""
        return lambda: None

    def spread(self, devices: Devices) -> "Objective":
        """The same objective with its examples spread over the devices of a mesh; to be used within `devices.map`.
        Unless a subclass says otherwise, every device computes all of it."""
        return self

    @abc.abstractmethod
    def thinned(self, examples: int) -> "Objective":
        """The same objective on at most so many of its examples, evenly spaced, normalised as on all of them."""

    @property
    @abc.abstractmethod
    def batch_share(self) -> float:
        """The share of the examples that `sample` draws: what a step costs, relative to `value` on all of them."""

    @abc.abstractmethod
    def with_eps(self, eps: float | Array) -> "Objective":
        """The same objective with the measure's scale replaced."""


class _OnExamples(Objective):
    """What the objectives of one measure on one set of examples have in common."""

    x: eqx.AbstractVar[Float[Array, "n d"]]
    measure: eqx.AbstractVar[Measure]
    batch_size: eqx.AbstractVar[int | None]
    precision: eqx.AbstractVar[str]
    chunk: eqx.AbstractVar[int]
    # What minibatches are read from, where that is not x.
    source: eqx.AbstractVar[Source | None]
    # How many examples there are, where x is only this device's part of them.
    total: eqx.AbstractVar[int | None]

    def sample(self, key, fetched=None):
        if fetched is not None:
            return _replace(self, x=fetched, total=None if self.total is None else self.batch_size)
        assert self.source is None, "the examples of this key are to be fetched first"
        if self.batch_size is None or self.batch_size >= len(self.x):
            return self
        return _replace(self, x=self.x[_draw(key, self.batch_size, len(self.x))])

    @property
    def fetched_bytes(self):
        rows = 0 if self.source is None or self.batch_size is None else self.batch_size
        return rows * self.x.shape[1] * self.x.dtype.itemsize

    def fetching(self, keys, devices):
        if self.source is None:
            return lambda: None
        rows = np.asarray(_draws(keys, self.batch_size, len(self.source)))
        return devices.reader(self.source, rows, self.x.dtype)

    def spread(self, devices):
        sampled = self.batch_size is not None and self.batch_size < len(self.x)
        source = ArrayRows(self.x) if self.source is None and sampled else self.source
        batch_size = None if source is None else self.batch_size
        return _replace(self, x=devices.rows(self.x), total=len(self.x), source=source, batch_size=batch_size)

    def sum(self, function):
        """The sum of `function(x_chunk, weights)` over all examples, in this objective's precision."""
        with jax.default_matmul_precision(self.precision):
            return chunked_sum(function, self.x, self.chunk, self.total)

    @property
    def count(self) -> int:
        """How many examples `sum` adds up."""
        return len(self.x) if self.total is None else self.total

    def thinned(self, examples):
        return _replace(self, x=self.x[:: -(-len(self.x) // examples)], source=None)

    @property
    def batch_share(self):
        return 1.0 if self.batch_size is None else min(1.0, self.batch_size / len(self.x))

    def with_eps(self, eps):
        return _replace(self, measure=with_eps(self.measure, eps, self.x.dtype))


class JacobianSparsity(_OnExamples):
    """`E_x mean_{o,i} S(z_oi(x))`, `z = Z sd / rms(Z sd)`, `Z(x) = R_out J(x) R_inᵀ`.

    Column i of Z is multiplied by `sd_i = √(r_i Σ r_iᵀ)`, the standard deviation of rotated input i, unless
    `scale_inputs=False`: a unit change along a direction that never varies is not a local change. The root mean
    square is that of all entries over all examples of `x` at the current rotations (exactly, from Σ and `E[JᵀJ]`,
    also when the examples are sampled), so the objective does not reward making Z small.

    `x` is `[n, d_in]`, or a source, of which a part is kept in `x`: on that the objective is valued and `E[JᵀJ]` is
    taken, while Σ is that of the whole source (`moments`, if they are known). `batch_size` examples are drawn for each
    step when it is given. `precision` is that of the large matrix products: "highest" is full float32; "tensorfloat32"
    limits ε to about 1% of the rms, "bfloat16" to about 5%.
    With `part=(s, t)` a step sees s rows and t columns of Z only, drawn uniformly with the minibatch: value and
    gradient stay unbiased (see `_Part`), and s = d_out/2, t = d_in/2 take about a quarter of the time.

    One value and gradient cost `2·n·(s·h·t + s²·t + s·t²)` flops, where s = d_out and t = d_in without `part`.

    Raises `ValueError` for inputs that do not fit the layer or are not finite, a tied fit of a layer with d_in ≠ d_out,
    and parts that are smaller than two or larger than the layer, or of a measure that is not elementwise.
    """

    layer: Layer
    x: Float[Array, "n d_in"]
    measure: Measure
    gram: Float[Array, "d_in d_in"]
    covariance: Float[Array, "d_in d_in"] | None
    space_in: str = eqx.field(static=True)
    space_out: str = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)
    part: tuple[int, int] | None = eqx.field(static=True)
    drawn: "_Part | None"
    precision: str = eqx.field(static=True)
    chunk: int = eqx.field(static=True)
    source: Source | None = eqx.field(static=True)
    total: int | None = eqx.field(static=True)

    def __init__(
        self,
        layer: Layer,
        x: Float[Data, "n d_in"] | Source,
        measure: Measure,
        *,
        scale_inputs: bool = True,
        space_in: str = "in",
        space_out: str = "out",
        batch_size: int | None = None,
        part: tuple[int, int] | None = None,
        precision: str = "highest",
        moments: Moments | None = None,
    ):
        kept, self.source = _in_memory(x, batch_size)
        self.x, self.total = checks.activations("x", kept, layer.d_in), None
        # Of examples that are not in memory some may activate more neurons than any of these.
        self.layer = layer = layer.gathered(self.x) if self.source is None else layer
        self.measure = with_eps(measure, measure.eps, self.x.dtype)
        self.gram = jnp.asarray(jacobian_gram(layer, self.x), self.x.dtype)
        self.covariance = None
        if scale_inputs:
            moments = _moments(self.x, self.source) if moments is None else moments
            self.covariance = jnp.asarray(moments.covariance, self.x.dtype)
        self.space_in, self.space_out = space_in, space_out
        if space_in == space_out and layer.d_in != layer.d_out:
            raise ValueError(f"a tied fit needs d_in = d_out, got {layer.d_in} and {layer.d_out}")
        self.batch_size = batch_size
        self.part, self.drawn = _check_part(part, layer, measure), None
        self.precision = precision
        self.chunk = chunk_size(layer, CHUNK_BYTES)

    @property
    def spaces(self):
        return {self.space_in: self.layer.d_in, self.space_out: self.layer.d_out}

    def within(self, subspace: Subspace) -> "JacobianSparsity":
        """The same objective on some directions of the layer's inputs and outputs only."""
        subspace = subspace.gathered(self.x) if self.source is None else subspace
        frame = subspace.frame_in
        part = None if self.part is None else (min(self.part[0], subspace.d_out), min(self.part[1], subspace.d_in))
        return _replace(
            self,
            layer=subspace,
            part=part,
            gram=jnp.asarray(jacobian_gram(subspace, self.x), self.x.dtype),
            covariance=None if self.covariance is None else matmul(matmul(frame, self.covariance), frame.T),
            chunk=chunk_size(subspace, CHUNK_BYTES),
        )

    def on(self, x: Float[Data, "n d_in"] | Source) -> "JacobianSparsity":
        """The same objective on other examples (held-out ones, say; of a source, the part that is kept in memory), with
        everything that normalises it computed anew from them."""
        return JacobianSparsity(
            self.layer,
            in_memory(x)[0],
            self.measure,
            scale_inputs=self.covariance is not None,
            space_in=self.space_in,
            space_out=self.space_out,
            precision=self.precision,
        )

    def sample(self, key, fetched=None):
        sampled = super().sample(key, fetched)
        if self.part is None:
            return sampled
        return _replace(sampled, drawn=_Part.draw(key, self.part, (self.layer.d_out, self.layer.d_in)))

    @property
    def batch_share(self):
        entries = self.layer.d_out * self.layer.d_in
        return super().batch_share * (1.0 if self.part is None else math.prod(self.part) / entries)

    def value(self, bases):
        r_in, r_out = bases[self.space_in], bases[self.space_out]
        column_scale = self._scale(r_in)[0]
        if self.drawn is not None:
            r_in, r_out, column_scale = self.drawn.select(r_in, r_out, column_scale)

        def chunk_sum(x, weights):
            z = self.layer.jacobian(x, r_in, r_out) * column_scale
            return jnp.sum(weights * self.measure.example_value(z))

        return self.sum(chunk_sum) / self.count

    def value_and_grad(self, bases):
        r_in, r_out = bases[self.space_in], bases[self.space_out]
        column_scale, variance, gain, sigma, gram = self._scale(r_in)
        if self.drawn is not None:
            r_in, r_out, column_scale = self.drawn.select(r_in, r_out, column_scale)
        entries = r_in.shape[0] * r_out.shape[0]

        def chunk_sums(x, weights):
            z = self.layer.jacobian(x, r_in, r_out) * column_scale
            g = self.measure.example_slope(z) * weights[:, None, None]
            value = jnp.sum(weights * self.measure.example_value(z))
            return value, jnp.einsum("noi,npi->op", g, z), jnp.einsum("noi,noj->ij", g, z)

        value, h_out, h_in = self.sum(chunk_sums)
        value, h_out, h_in = value / self.count, h_out / (self.count * entries), h_in / (self.count * entries)
        if self.drawn is not None:
            h_out, h_in = self.drawn.spread(h_out, h_in, (self.layer.d_out, self.layer.d_in))

        # h_in is E[Gᵀ Z'] with Z' = Z sd/ρ; the derivative through Z alone is sd_i (Gᵀ Z')_ij / sd_j.
        grad_in = h_in
        if sigma is not None:
            sd = jnp.sqrt(variance)
            grad_in = sd[:, None] * h_in / sd
            # through sd_i, whose derivative along δr_i is (δr_i Σ r_iᵀ)/sd_i ...
            pull = jnp.diagonal(h_in)
            grad_in += (pull / variance)[:, None] * sigma
            # ... and through ρ² = mean_i(sd_i² ‖J r_i‖²), which all entries share.
            share = jnp.sum(pull) / jnp.sum(variance * gain)
            grad_in -= share * (gain[:, None] * sigma + variance[:, None] * gram)
        return value, _add({self.space_in: skew(grad_in)}, {self.space_out: skew(h_out)})

    def _scale(self, r_in):
        """`sd_i / ρ` for every column, and what the gradient needs: `sd²`, `E‖J r_i‖²`, `R Σ Rᵀ` and `R E[JᵀJ] Rᵀ`."""
        gram = matmul(matmul(r_in, self.gram), r_in.T)
        gain = jnp.diagonal(gram)
        entries = r_in.shape[0] * self.layer.d_out
        if self.covariance is None:
            return jax.lax.rsqrt(jnp.sum(gain) / entries), jnp.ones_like(gain), gain, None, gram
        sigma = matmul(matmul(r_in, self.covariance), r_in.T)
        variance = jnp.maximum(jnp.diagonal(sigma), 0)
        variance += VARIANCE_FLOOR * jnp.trace(self.covariance) / self.layer.d_in
        return jnp.sqrt(variance * entries / jnp.sum(variance * gain)), variance, gain, sigma, gram


class _Part(eqx.Module):
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
    def draw(cls, key: PRNGKeyArray, part: tuple[int, int], shape: tuple[int, int]) -> "_Part":
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


class ActivationSparsity(_OnExamples):
    """`E_x mean_i S(z_i)`, `z = R x / rms(x)`: a basis in which the activations themselves are sparse.

    `x` is `[n, d]`: a layer's inputs, or `layer(x)` for its outputs; or a source, as for `JacobianSparsity`. The rms is
    over all entries and does not depend on the rotation. One value and gradient cost `4·n·d²` flops.
    """

    x: Float[Array, "n d"]
    rms: Float[Array, ""]
    measure: Measure
    space: str = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)
    precision: str = eqx.field(static=True)
    chunk: int = eqx.field(static=True)
    source: Source | None = eqx.field(static=True)
    total: int | None = eqx.field(static=True)

    def __init__(
        self,
        x: Float[Data, "n d"] | Source,
        measure: Measure,
        *,
        space: str = "in",
        batch_size: int | None = None,
        precision: str = "highest",
        moments: Moments | None = None,
    ):
        kept, self.source = _in_memory(x, batch_size)
        self.x, self.total = checks.activations("x", kept, jnp.shape(kept)[-1] if jnp.ndim(kept) else 0), None
        self.rms = jnp.sqrt(jnp.mean(jnp.square(self.x)))
        if self.source is not None:
            moments = _moments(self.x, self.source) if moments is None else moments
            self.rms = jnp.asarray(moments.rms, self.x.dtype)
        self.measure = with_eps(measure, measure.eps, self.x.dtype)
        self.space = space
        self.batch_size = batch_size
        self.precision = precision
        self.chunk = max(1, CHUNK_BYTES // (3 * self.x.dtype.itemsize * self.x.shape[1]))

    @property
    def spaces(self):
        return {self.space: self.x.shape[1]}

    def on(self, x: Float[Data, "n d"] | Source) -> "ActivationSparsity":
        """The same objective on other examples; of a source, on the part that is kept in memory."""
        return ActivationSparsity(in_memory(x)[0], self.measure, space=self.space, precision=self.precision)

    def value(self, bases):
        r = bases[self.space] / self.rms

        def chunk_sum(x, weights):
            return jnp.sum(weights * self.measure.example_value(x @ r.T))

        return self.sum(chunk_sum) / self.count

    def value_and_grad(self, bases):
        r = bases[self.space] / self.rms

        def chunk_sums(x, weights):
            z = x @ r.T
            g = self.measure.example_slope(z) * weights[:, None]
            return jnp.sum(weights * self.measure.example_value(z)), g.T @ z

        value, h = self.sum(chunk_sums)
        return value / self.count, {self.space: skew(h / (self.count * self.x.shape[1]))}


class WeightedSum(Objective):
    """`Σ_k w_k F_k`, each term on its own spaces; terms that name the same space share its rotation."""

    terms: tuple[Objective, ...]
    weights: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, terms, weights=None):
        self.terms = tuple(terms)
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.terms)
        if not self.terms or len(self.weights) != len(self.terms):
            raise ValueError(
                f"expected one weight for each term, got {len(self.terms)} terms, {len(self.weights)} weights"
            )
        _ = self.spaces

    @property
    def spaces(self):
        spaces: dict[str, int] = {}
        for term in self.terms:
            for name, d in term.spaces.items():
                if spaces.setdefault(name, d) != d:
                    raise ValueError(f"space {name!r} has dimension {spaces[name]} in one term and {d} in another")
        return spaces

    def sample(self, key, fetched=None):
        keys = jax.random.split(key, len(self.terms))
        parts = (None,) * len(self.terms) if fetched is None else fetched
        # Terms of other classes need not know of fetched examples.
        given = [() if part is None else (part,) for part in parts]
        terms = tuple(term.sample(k, *part) for term, k, part in zip(self.terms, keys, given, strict=True))
        return _replace(self, terms=terms)

    def fetching(self, keys, devices):
        keys = jax.vmap(jax.vmap(lambda key: jax.random.split(key, len(self.terms))))(keys)
        reads = [term.fetching(keys[..., i], devices) for i, term in enumerate(self.terms)]
        return lambda: tuple(read() for read in reads)

    @property
    def fetched_bytes(self):
        return sum(term.fetched_bytes for term in self.terms)

    def spread(self, devices):
        return _replace(self, terms=tuple(term.spread(devices) for term in self.terms))

    def thinned(self, examples):
        return _replace(self, terms=tuple(term.thinned(examples) for term in self.terms))

    @property
    def batch_share(self):
        return sum(term.batch_share for term in self.terms) / len(self.terms)

    def with_eps(self, eps):
        return _replace(self, terms=tuple(term.with_eps(eps) for term in self.terms))

    def value(self, bases):
        values = [w * term.value(bases) for w, term in zip(self.weights, self.terms, strict=True)]
        return jnp.sum(jnp.stack(values))

    def value_and_grad(self, bases):
        total, grads = jnp.zeros(()), {}
        for w, term in zip(self.weights, self.terms, strict=True):
            value, grad = term.value_and_grad(bases)
            total += w * value
            grads = _add(grads, jax.tree.map(lambda g, w=w: w * g, grad))
        return total, grads


class Held(Objective):
    """An objective with the rotations of some spaces held fixed: the solver does not see them."""

    objective: Objective
    held: Bases

    @property
    def spaces(self):
        return {name: d for name, d in self.objective.spaces.items() if name not in self.held}

    def sample(self, key, fetched=None):
        return Held(self.objective.sample(key, *(() if fetched is None else (fetched,))), self.held)

    @property
    def fetched_bytes(self):
        return self.objective.fetched_bytes

    def fetching(self, keys, devices):
        return self.objective.fetching(keys, devices)

    def spread(self, devices):
        return Held(self.objective.spread(devices), self.held)

    def thinned(self, examples):
        return Held(self.objective.thinned(examples), self.held)

    @property
    def batch_share(self):
        return self.objective.batch_share

    def with_eps(self, eps):
        return Held(self.objective.with_eps(eps), self.held)

    def value(self, bases):
        return self.objective.value(bases | self.held)

    def value_and_grad(self, bases):
        value, grads = self.objective.value_and_grad(bases | self.held)
        return value, {name: g for name, g in grads.items() if name not in self.held}


def chunked_sum(function, x: Float[Data, "n d"], chunk: int, total: int | None = None):
    """Sum of `function(x_chunk, weights)` over chunks of examples, one in memory at a time. The last chunk is filled up
    with copies of weight zero.

    With `total`, x is this device's part of so many examples, the last part filled up, and the sum is over all devices.
    """
    if total is None:
        return _chunked_sum(function, x, chunk, len(x))
    count = total - jax.lax.axis_index(EXAMPLES) * len(x)
    return jax.lax.psum(_chunked_sum(function, x, chunk, count), EXAMPLES)


def _chunked_sum(function, x, chunk: int, count):
    """... of which the first `count` are to be counted."""
    n = len(x)
    if n <= chunk:
        return function(x, (jnp.arange(n) < count).astype(x.dtype))
    chunks = -(-n // chunk)
    chunk = -(-n // chunks)  # as even as possible: fewer copies
    rows = jnp.arange(chunks * chunk).reshape(chunks, chunk)

    def body(total, row):
        part = function(x[jnp.minimum(row, n - 1)], (row < jnp.minimum(count, n)).astype(x.dtype))
        return jax.tree.map(jnp.add, total, part), None

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, x[:chunk], x[:chunk, 0]))
    return jax.lax.scan(body, zeros, rows)[0]


def _in_memory(x, batch_size: int | None) -> tuple[Any, Source | None]:
    """`in_memory`, with a check that a source's minibatches have a size."""
    x, source = in_memory(x)
    if source is not None and batch_size is None:
        raise ValueError(
            f"{source} is too large to be looked at as a whole in every step: give batch_size, the examples a step"
        )
    return x, source


def _moments(x, source: Source | None) -> Moments:
    """Of all examples, whether they are in memory or not."""
    return Moments.of(x) if source is None else stream_moments(source)


def _draw(key: PRNGKeyArray, count: int, examples: int) -> Int[Array, "count"]:
    """The rows of a minibatch: the same ones wherever the examples are."""
    return jax.random.randint(key, (count,), 0, examples)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draws(keys: PRNGKeyArray, count: int, examples: int) -> Int[Array, "restarts steps count"]:
    return jax.vmap(jax.vmap(lambda key: _draw(key, count, examples)))(keys)


def _add(a: Bases, b: Bases) -> Bases:
    return {name: a[name] + b[name] if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}


def _check_part(part, layer, measure):
    if part is None:
        return None
    shape = (layer.d_out, layer.d_in)
    if len(part) != 2 or not all(2 <= n <= d for n, d in zip(part, shape, strict=True)):
        raise ValueError(f"part is how many of the {shape[0]} rows and {shape[1]} columns a step sees, got {part}")
    if type(measure).example_value is not Measure.example_value:
        raise ValueError(f"parts of the Jacobian need an elementwise measure, and {type(measure).__name__} is none")
    return (int(part[0]), int(part[1]))


def _replace(objective, **fields):
    new = object.__new__(type(objective))
    for field in dataclasses.fields(objective):
        object.__setattr__(new, field.name, fields.get(field.name, getattr(objective, field.name)))
    return new
