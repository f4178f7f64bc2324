"""`Examples`: the examples of an objective, and how minibatches are drawn from them.

The key of a step alone determines its rows, whether they are in memory, on disk, or spread over devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray

from rotsparse._core.modules import replace_fields
from rotsparse._core.types import AnyArray
from rotsparse.data.devices import EXAMPLES, Devices
from rotsparse.data.moments import Moments, evenly_spaced, stream_moments
from rotsparse.data.sources import ArrayRows, Source


class Examples(eqx.Module):
    """Rows `x` in memory, and the `source` from which minibatches are read if it has more rows.

    `total`: the number of examples, if `x` is only this device's share of them.
    """

    x: Float[Array, "n d"]
    source: Source | None = eqx.field(static=True, default=None)
    total: int | None = eqx.field(static=True, default=None)

    @property
    def count(self) -> int:
        """The number of examples in `sum`."""
        return len(self.x) if self.total is None else self.total

    @property
    def total_count(self) -> int:
        """The number of examples that minibatches are drawn from."""
        return self.count if self.source is None else len(self.source)

    @property
    def known(self) -> AnyArray:
        """All examples that are in memory, more perhaps than `x`, on which an objective is looked at."""
        return self.source.x if isinstance(self.source, ArrayRows) else self.x

    def moments(self) -> Moments:
        """Mean and covariance of all examples, whether they are in memory or not."""
        return Moments.of(self.x) if self.source is None else stream_moments(self.source)

    def sum(self, function: Callable, chunk: int, prepare: Callable | None = None) -> Any:
        """The sum of `function(x_chunk, weights)` over all examples, on all devices (see `chunked_sum`)."""
        return chunked_sum(function, self.x, chunk, self.total, prepare)

    def thinned(self, count: int) -> "Examples":
        """At most `count` of the examples in memory, evenly spaced."""
        return replace_fields(self, x=evenly_spaced(self.x, count), source=None)

    # --- minibatches

    def draw(self, key: PRNGKeyArray, count: int | None, fetched: Any = None) -> "Examples":
        """`count` random examples, drawn with replacement, so that means over them are unbiased; all examples if
        `count` is `None` or not smaller than their number. `fetched`: the rows for this key, if `reading` has read
        them."""
        if fetched is not None:
            return replace_fields(self, x=fetched, total=None if self.total is None else count)
        assert self.source is None, "the examples of this key are to be fetched first"
        if count is None or count >= len(self.x):
            return self
        return replace_fields(self, x=self.x[_rows(key, count, len(self.x))])

    def share(self, count: int | None) -> float:
        """The share of the examples in memory that `draw` returns: the cost of a step relative to all of them."""
        return 1.0 if count is None else min(1.0, count / len(self.x))

    def fetched_bytes(self, count: int | None) -> int:
        """The bytes that `reading` reads for one step of one restart."""
        rows = 0 if self.source is None or count is None else count
        return rows * self.x.shape[1] * self.x.dtype.itemsize

    def reading(self, keys: Key[Array, "restarts steps"], count: int | None, devices: Devices) -> Callable[[], Any]:
        """A function that reads the examples that `draw` draws with each of these keys `[restarts, steps]`. It may run
        in any thread."""
        if self.source is None or count is None:
            return lambda: None
        rows = np.asarray(_rows_of_steps(keys, count, len(self.source)))
        return devices.reader(self.source, rows, self.x.dtype)

    def spread(self, devices: Devices, count: int | None) -> "Examples":
        """The examples spread over the devices of a mesh; to be used within `devices.map`. Minibatches of `count` are
        then read like those of a source."""
        sampled = count is not None and count < len(self.x)
        source = ArrayRows(self.x) if self.source is None and sampled else self.source
        return Examples(devices.rows(self.x), source, len(self.x))


# Where chunks are single examples, so many are prepared at once. A product with one vector takes about as long as one
# with many, the time to read the weights: at a width of 768 a quarter of the objective.
PREPARED_AT_ONCE = 64


def chunked_sum(
    function: Callable,
    x: Float[Array, "n d"],
    chunk: int,
    total: int | None = None,
    prepare: Callable | None = None,
) -> Any:
    """Sum of `function(x_chunk, weights)` over chunks of examples, one in memory at a time. The last chunk is padded
    with copies of weight zero.

    With `total`, x is this device's share of so many examples (the last share is padded), and the sum is over all
    devices. With `prepare` it is the sum of `function(x_chunk, weights, prepare(x_chunk))`; `prepare` sees each example
    on its own, but many at once.
    """
    if prepare is not None and chunk == 1:
        function, chunk = _one_by_one(function, prepare), PREPARED_AT_ONCE
    elif prepare is not None:
        function = _together(function, prepare)
    if total is None:
        return _chunked_sum(function, x, chunk, len(x))
    count = total - jax.lax.axis_index(EXAMPLES) * len(x)
    return jax.lax.psum(_chunked_sum(function, x, chunk, count), EXAMPLES)


def _together(function, prepare):
    """The function of a chunk and what is prepared of it."""
    return lambda x, weights: function(x, weights, prepare(x))


def _one_by_one(function, prepare):
    """The sum over a chunk, prepared at once, of the function of each example."""
    return lambda x, weights: _scanned(function, jax.tree.map(lambda a: a[:, None], (x, weights, prepare(x))))


def _chunked_sum(function, x, chunk: int, count):
    """The same on one device, with weight zero after the first `count` examples."""
    n = len(x)
    if n <= chunk:
        return function(x, (jnp.arange(n) < count).astype(x.dtype))
    chunks = -(-n // chunk)
    chunk = -(-n // chunks)  # as even as possible: fewer copies
    rows = jnp.arange(chunks * chunk).reshape(chunks, chunk)

    def of(row):
        return function(x[jnp.minimum(row, n - 1)], (row < jnp.minimum(count, n)).astype(x.dtype))

    return _scanned(of, (rows,))


def _scanned(function, rows):
    """The sum of `function(*row)` over the rows of a tree of arrays, one after another."""
    shapes = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], rows))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, row: (jax.tree.map(jnp.add, total, function(*row)), None), zeros, rows)[0]


def _rows(key: PRNGKeyArray, count: int, examples: int) -> Int[Array, "count"]:
    return jax.random.randint(key, (count,), 0, examples)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rows_of_steps(keys: Key[Array, "restarts steps"], count: int, examples: int) -> Int[Array, "restarts steps count"]:
    return jax.vmap(jax.vmap(lambda key: _rows(key, count, examples)))(keys)
