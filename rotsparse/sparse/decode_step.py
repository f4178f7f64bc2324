"""One step of decoding with a key/value cache, for Llama's family, in numba: what every thread of it does.

The threads go through the layers together and share the work of each product: of `dots` the outputs, of `gather` the
active rows. What is small (norms, the choice of active rows) each does for itself. Between the parts they wait for each
other; a part's results are in an array of its own, one row a thread, to be added up by whoever reads them.
"""

import math
from typing import NamedTuple

import numba as nb
import numpy as np

from rotsparse.sparse.kernels import FAST, active, dots, exp, gather, share, wait


class Matrix(NamedTuple):
    """The matrices of all layers that read one site, and the rotation in front of them.

    `weights`: flat; a layer's begin at `begins`, W [out, in] where all of it is read, Wᵀ [in, out] where `gathered`,
    rows padded to `widths`. `scales`: a factor for each row. `biases`: `[layers, out]`. `threshold`, `count` (negative:
    there is none), `shifts` and `scores`: of the `SparseInput`.
    """

    weights: np.ndarray
    begins: np.ndarray
    widths: np.ndarray
    gathered: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    threshold: np.ndarray
    count: np.ndarray
    shifts: np.ndarray
    scores: np.ndarray
    rotations: np.ndarray
    rotation_begins: np.ndarray
    rotation_scales: np.ndarray


class Shape(NamedTuple):
    """Sizes and numbers of the architecture. `activation`: 0 silu, 1 gelu, 2 gelu by tanh."""

    layers: int
    d_model: int
    d_hidden: int
    heads: int
    groups: int
    d_head: int
    vocabulary: int
    turned: int
    activation: int
    eps: float
    attention_scale: float


class Constants(NamedTuple):
    """What is not the matrices of a site. `norms`: `[2 layers + 1, d]`, of attention and MLP in turn, then the last;
    `q_norms`, `k_norms`: `[layers, d_head]`, of no layers where there are none; `cos`, `sin`: `[tokens, turned / 2]`.
    """

    head: np.ndarray
    head_scales: np.ndarray
    norms: np.ndarray
    q_norms: np.ndarray
    k_norms: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    windows: np.ndarray


class State(NamedTuple):
    """Arrays to compute in; those of two axes have a row for each thread. `read`: how many rows of each site's matrices
    were read so far."""

    stream: np.ndarray
    site: np.ndarray
    rotated: np.ndarray
    keys_of: np.ndarray
    rows: np.ndarray
    factors: np.ndarray
    out: np.ndarray
    query: np.ndarray
    weights: np.ndarray
    heads: np.ndarray
    hidden: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    logits: np.ndarray
    counter: np.ndarray
    read: np.ndarray


@nb.njit(nogil=True, fastmath=FAST)
def _norm(x, n, scale, eps, y):
    total = np.float32(0)
    for i in range(n):
        total += x[i] * x[i]
    factor = np.float32(1 / np.sqrt(total / n + eps))
    for i in range(n):
        y[i] = x[i] * factor * scale[i]


@nb.njit(nogil=True, fastmath=FAST)
def _sum(parts, bias, n, y):
    """The sum over the threads."""
    for i in range(n):
        y[i] = bias[i]
    for part in parts:
        for i in range(n):
            y[i] += part[i]


@nb.njit(nogil=True)
def _product(m, layer, x, n_in, n_out, s, place, rank, threads):
    """A thread's part of `b + W x̂` into `s.out[place, rank]`. `x` is the thread's own, and is changed."""
    begin = m.rotation_begins[layer]
    if begin >= 0:
        lo, hi = share(n_in, rank, threads)
        dots(m.rotations, begin, len(x), m.rotation_scales[layer], x, lo, hi, s.rotated[place & 1])
        wait(s.counter, threads)
        x[:n_in] = s.rotated[place & 1, :n_in]
    out, width = s.out[place, rank], m.widths[layer]
    if m.gathered[layer]:
        rows, factors = s.rows[rank], s.factors[rank]
        kept = active(
            x,
            n_in,
            m.shifts[layer],
            m.scores[layer],
            m.threshold[layer],
            m.count[layer],
            m.scales[layer],
            s.keys_of[rank],
            rows,
            factors,
        )
        lo, hi = share(kept, rank, threads)
        gather(m.weights, m.begins[layer], width, rows, factors, lo, hi, out)
        if rank == 0:
            s.read[place] += kept
    else:
        lo, hi = share(n_out, rank, threads)
        out[:n_out] = 0
        dots(m.weights, m.begins[layer], width, m.scales[layer], x, lo, hi, out)
        if rank == 0:
            s.read[place] += n_in
    wait(s.counter, threads)


@nb.njit(nogil=True, fastmath=FAST)
def _turn(x, cos, sin, half):
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i] + a * sin[i]


@nb.njit(nogil=True, fastmath=FAST, error_model="numpy")
def _attend(q, keys, values, first, position, scale, weights, y):
    """What a head sees from `first` to `position`."""
    most = np.float32(-np.inf)
    for t in range(first, position + 1):
        key, score = keys[t], np.float32(0)
        for i in range(len(q)):
            score += q[i] * key[i]
        weights[t] = score * scale
        most = max(most, weights[t])
    total = np.float32(0)
    for t in range(first, position + 1):
        weights[t] = exp(weights[t] - most)
        total += weights[t]
    y[:] = 0
    for t in range(first, position + 1):
        share_of, value = weights[t] / total, values[t]
        for i in range(len(q)):
            y[i] += share_of * value[i]


@nb.njit(nogil=True)
def _attention(shape, c, s, layer, position, rank, threads):
    """Mix the values of the heads that are this thread's. Every thread writes the same keys and values."""
    d, groups, qkv = shape.d_head, shape.groups, s.query[rank]
    for g in range(groups):
        key = qkv[(shape.heads + g) * d : (shape.heads + g + 1) * d]
        if len(c.k_norms):
            _norm(key, d, c.k_norms[layer], shape.eps, key)
        _turn(key, c.cos[position], c.sin[position], shape.turned // 2)
        s.keys[layer, g, position] = key
        value = (shape.heads + groups + g) * d
        s.values[layer, g, position] = qkv[value : value + d]
    first = max(0, position + 1 - c.windows[layer])
    lo, hi = share(shape.heads, rank, threads)
    for h in range(lo, hi):
        q, g = qkv[h * d : (h + 1) * d], h * groups // shape.heads
        if len(c.q_norms):
            _norm(q, d, c.q_norms[layer], shape.eps, q)
        _turn(q, c.cos[position], c.sin[position], shape.turned // 2)
        mixed = s.heads[h * d : (h + 1) * d]
        scale = np.float32(shape.attention_scale)
        _attend(q, s.keys[layer, g], s.values[layer, g], first, position, scale, s.weights[rank], mixed)
    wait(s.counter, threads)


@nb.njit(nogil=True, fastmath=FAST, error_model="numpy")
def _gate(parts, bias, shape, lo, hi, hidden):
    """`φ(g) u` for some of the hidden units; g stands in front of u, and both are overwritten in the first part. (With
    NumPy's error model: a test of each division for zero would keep the loop from being done in registers of 16.)"""
    n, one = shape.d_hidden, np.float32(1)
    gates, ups = parts[0, :n], parts[0, n : 2 * n]
    for i in range(lo, hi):
        gates[i] += bias[i]
        ups[i] += bias[n + i]
    for part in parts[1:]:
        for i in range(lo, hi):
            gates[i] += part[i]
            ups[i] += part[n + i]
    for i in range(lo, hi):
        g = gates[i]
        if shape.activation == 0:
            hidden[i] = g / (one + exp(-g)) * ups[i]
        elif shape.activation == 1:
            hidden[i] = np.float32(0.5) * g * (one + np.float32(math.erf(g * np.float32(0.7071067811865476)))) * ups[i]
        else:
            inner = np.float32(0.7978845608028654) * (g + np.float32(0.044715) * g * g * g)
            hidden[i] = np.float32(0.5) * g * (one + np.tanh(inner)) * ups[i]


@nb.njit(nogil=True, cache=True)
def step(shape, constants, attention, heads, input_, hidden, state, position, rank, threads):
    """Thread `rank`'s part of one token, whose embedding is `state.stream[rank]`: the logits in `state.logits`."""
    c, s, d = constants, state, shape.d_model
    x, u = s.stream[rank], s.site[rank]
    n_heads = shape.heads * shape.d_head
    n_qkv = n_heads + 2 * shape.groups * shape.d_head
    for layer in range(shape.layers):
        u[:] = 0
        _norm(x, d, c.norms[2 * layer], shape.eps, u)
        _product(attention, layer, u[: attention.shifts.shape[1]], d, n_qkv, s, 0, rank, threads)
        _sum(s.out[0], attention.biases[layer], n_qkv, s.query[rank])
        _attention(shape, c, s, layer, position, rank, threads)
        u[:] = 0
        u[:n_heads] = s.heads[:n_heads]
        _product(heads, layer, u[: heads.shifts.shape[1]], n_heads, d, s, 1, rank, threads)
        _sum(s.out[1], heads.biases[layer], d, u)
        x += u[:d]
        u[:] = 0
        _norm(x, d, c.norms[2 * layer + 1], shape.eps, u)
        _product(input_, layer, u[: input_.shifts.shape[1]], d, 2 * shape.d_hidden, s, 2, rank, threads)
        lo, hi = share(shape.d_hidden, rank, threads)
        _gate(s.out[2], input_.biases[layer], shape, lo, hi, s.hidden)
        wait(s.counter, threads)
        u[:] = 0
        u[: shape.d_hidden] = s.hidden[: shape.d_hidden]
        _product(hidden, layer, u[: hidden.shifts.shape[1]], shape.d_hidden, d, s, 3, rank, threads)
        _sum(s.out[3], hidden.biases[layer], d, u)
        x += u[:d]
    u[:] = 0
    width = attention.shifts.shape[1]
    _norm(x, d, c.norms[2 * shape.layers], shape.eps, u)
    lo, hi = share(shape.vocabulary, rank, threads)
    dots(c.head, 0, width, c.head_scales, u[:width], lo, hi, s.logits)
    wait(s.counter, threads)
