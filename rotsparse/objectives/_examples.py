"""What the objectives of one measure on one set of examples have in common: minibatches, chunks, and where the examples
are."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from rotsparse._core.modules import replace_fields
from rotsparse._core.types import Data
from rotsparse.data.devices import EXAMPLES
from rotsparse.data.moments import Moments, evenly_spaced, stream_moments
from rotsparse.data.sources import ArrayRows, Source, in_memory
from rotsparse.objectives.base import Objective
from rotsparse.objectives.measures import Measure, with_eps

# Memory for the per-example arrays of one chunk. Larger chunks are no faster: this keeps a core's matrix products busy
# and the intermediate results near the cache.
CHUNK_BYTES = 8 * 2**20


class OnExamples(Objective):
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
            return replace_fields(self, x=fetched, total=None if self.total is None else self.batch_size)
        assert self.source is None, "the examples of this key are to be fetched first"
        if self.batch_size is None or self.batch_size >= len(self.x):
            return self
        return replace_fields(self, x=self.x[_draw(key, self.batch_size, len(self.x))])

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
        return replace_fields(self, x=devices.rows(self.x), total=len(self.x), source=source, batch_size=batch_size)

    def sum(self, function):
        """The sum of `function(x_chunk, weights)` over all examples, in this objective's precision."""
        with jax.default_matmul_precision(self.precision):
            return chunked_sum(function, self.x, self.chunk, self.total)

    @property
    def count(self) -> int:
        """How many examples `sum` adds up."""
        return len(self.x) if self.total is None else self.total

    def thinned(self, examples):
        return replace_fields(self, x=evenly_spaced(self.x, examples), source=None)

    @property
    def batch_share(self):
        return 1.0 if self.batch_size is None else min(1.0, self.batch_size / len(self.x))

    @property
    def work(self):
        return float(len(self.x))

    def with_eps(self, eps):
        return replace_fields(self, measure=with_eps(self.measure, eps, self.x.dtype))


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


def examples_of(x, batch_size: int | None) -> tuple[Any, Source | None]:
    """`in_memory`, with a check that a source's minibatches have a size."""
    x, source = in_memory(x)
    if source is not None and batch_size is None:
        raise ValueError(
            f"{source} is too large to be looked at as a whole in every step: give batch_size, the examples a step"
        )
    return x, source


def moments_of(x, source: Source | None) -> Moments:
    """Of all examples, whether they are in memory or not."""
    return Moments.of(x) if source is None else stream_moments(source)


def _draw(key: PRNGKeyArray, count: int, examples: int) -> Int[Array, "count"]:
    """The rows of a minibatch: the same ones wherever the examples are."""
    return jax.random.randint(key, (count,), 0, examples)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draws(keys: PRNGKeyArray, count: int, examples: int) -> Int[Array, "restarts steps count"]:
    return jax.vmap(jax.vmap(lambda key: _draw(key, count, examples)))(keys)
