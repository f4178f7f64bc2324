"""Kernels of the decode step for CPUs, in numba: products of a vector with rows of a matrix.

Decoding one sequence reads every weight once for each token, so it is as fast as memory is read. Two products:

    dots     y_i = w_i · x        all rows w_i of W [out, in]: nothing is skipped
    gather   y = Σ_k a_k w_k      active rows w_k of Wᵀ [in, out]: those whose coordinate is zero are not read

Memory is read at its full rate only ahead of time. A processor sees by itself where `dots` goes on, but not which row
is active next: so `gather` takes eight rows at once, and asks for the eight that come after the next eight. Weights are
float32, bfloat16 (as uint16) or int8, and are widened in registers. Rows are whole cache lines.
"""

import os
from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import extending, types

from rotsparse.sparse.decode_weights import LINE

_LANES = 16
ABANDONED = 1 << 62
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTEGERS = ir.VectorType(_F32, _LANES), ir.VectorType(_I32, _LANES)
_STORED = {32: ir.VectorType(_F32, _LANES), 16: ir.VectorType(_I16, _LANES), 8: ir.VectorType(_I8, _LANES)}
intrinsic: Any = extending.intrinsic  # its type is that of what it decorates, with one argument more
FAST = {"reassoc", "contract", "nsz", "arcp"}


# --- what numba has no words for ----------------------------------------------------------------------------------


def _external(builder, name, result, arguments):
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _fma(builder, a, b, c):
    function = _external(builder, f"llvm.fma.v{_LANES}f32", _VECTOR, [_VECTOR] * 3)
    return builder.call(function, [a, b, c])


def _data(context, builder, kind, value):
    return context.make_array(kind)(context, builder, value).data


def _at(builder, data, index, kind):
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _weights(builder, data, index, bits):
    """Sixteen stored weights as float32."""
    stored = builder.load(_at(builder, data, index, _STORED[bits]), align=1)
    if bits == 32:
        return stored
    if bits == 8:
        return builder.sitofp(stored, _VECTOR)
    wide = builder.shl(builder.zext(stored, _INTEGERS), ir.Constant(_INTEGERS, [16] * _LANES))
    return builder.bitcast(wide, _VECTOR)


def _everywhere(builder, value):
    undefined = ir.Constant(_VECTOR, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTEGERS, [0] * _LANES))


@intrinsic
def _add_line(typingctx, y, j, w, rows, ahead, a):
    """`y[j:j+n] += Σ_u a[u] w[rows[u]+j:...]` for the n weights of a cache line; fetch `w[ahead[u]+j]`."""
    bits = w.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        kinds, (y, j, w, rows, ahead, a) = signature.args, arguments
        y, w = _data(context, builder, kinds[0], y), _data(context, builder, kinds[2], w)
        many = range(len(kinds[3]))
        fetch = _external(builder, "llvm.prefetch.p0", ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
        for u in many:
            place = builder.add(builder.extract_value(ahead, u), j)
            builder.call(fetch, [_at(builder, w, place, _I8), _I32(0), _I32(1), _I32(1)])  # read, not into L1, data
        factors = [_everywhere(builder, builder.extract_value(a, u)) for u in many]
        starts = [builder.add(builder.extract_value(rows, u), j) for u in many]
        for step in range(0, LINE * 8 // bits, _LANES):
            place = _at(builder, y, builder.add(j, _I64(step)), _VECTOR)
            total = builder.load(place, align=4)
            for u in many:
                part = _weights(builder, w, builder.add(starts[u], _I64(step)), bits)
                total = _fma(builder, factors[u], part, total)
            builder.store(total, place, align=4)
        return context.get_dummy_value()

    return types.void(y, j, w, rows, ahead, a), generate


@intrinsic
def _dot(typingctx, w, start, x, n):
    """`Σ_j w[start+j] x[j]` for j below n, a multiple of 64: four sums, so that one need not wait for the other."""
    bits, many = w.dtype.bitwidth, range(4)

    def generate(context, builder, signature, arguments):
        kinds, (w, start, x, n) = signature.args, arguments
        w, x = _data(context, builder, kinds[0], w), _data(context, builder, kinds[2], x)
        before, loop, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        j, totals = builder.phi(_I64), [builder.phi(_VECTOR) for _ in many]
        sums = []
        for u in many:
            at = builder.add(j, _I64(u * _LANES))
            values = builder.load(_at(builder, x, at, _VECTOR), align=4)
            sums.append(_fma(builder, values, _weights(builder, w, builder.add(start, at), bits), totals[u]))
        after, zero = builder.add(j, _I64(len(many) * _LANES)), ir.Constant(_VECTOR, [0.0] * _LANES)
        for phi, first, following in ((j, _I64(0), after), *((t, zero, s) for t, s in zip(totals, sums, strict=True))):
            phi.add_incoming(first, before)
            phi.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", after, n), loop, end)
        builder.position_at_end(end)
        total = builder.fadd(builder.fadd(sums[0], sums[1]), builder.fadd(sums[2], sums[3]))
        reduce = _external(builder, f"llvm.vector.reduce.fadd.v{_LANES}f32", _F32, [_F32, _VECTOR])
        return builder.call(reduce, [_F32(0.0), total], fastmath=("reassoc",))

    return types.float32(w, start, x, n), generate


@intrinsic
def float_bits(typingctx, x):
    """The bits of a float32 as an unsigned integer: of numbers that are not negative, in their order."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), generate


@intrinsic
def _float_of(typingctx, bits):
    """The float32 that has these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.uint32), generate


@intrinsic
def _arrive(typingctx, counter):
    """Add one to `counter[0]`, and return what it was."""

    def generate(context, builder, signature, arguments):
        data = _data(context, builder, signature.args[0], arguments[0])
        return builder.atomic_rmw("add", data, _I64(1), "seq_cst")

    return types.int64(counter), generate


@intrinsic
def _count(typingctx, counter):
    """`counter[0]`, as the other threads left it."""

    def generate(context, builder, signature, arguments):
        data = _data(context, builder, signature.args[0], arguments[0])
        return builder.load_atomic(data, "seq_cst", align=8)

    return types.int64(counter), generate


@intrinsic
def _let_others_run(typingctx):
    def generate(context, builder, signature, arguments):
        if hasattr(os, "sched_yield"):
            builder.call(_external(builder, "sched_yield", _I32, []), [])
        return context.get_dummy_value()

    return types.void(), generate


# --- products -----------------------------------------------------------------------------------------------------


@nb.njit(nogil=True)
def _eight(rows, k, last, first, width):
    """Where the rows number k to k + 7 begin (the last one in place of those behind it)."""
    return (
        first + rows[min(k, last)] * width,
        first + rows[min(k + 1, last)] * width,
        first + rows[min(k + 2, last)] * width,
        first + rows[min(k + 3, last)] * width,
        first + rows[min(k + 4, last)] * width,
        first + rows[min(k + 5, last)] * width,
        first + rows[min(k + 6, last)] * width,
        first + rows[min(k + 7, last)] * width,
    )


@nb.njit(nogil=True)
def gather(w, first, width, rows, a, begin, end, y):
    """`y = Σ_k a[k] Wᵀ[rows[k]]` for k from `begin` to `end`: `w` holds the rows of Wᵀ from `first` on, each `width`
    long, whole cache lines."""
    y[:width] = 0
    line, last, k = LINE // w.itemsize, end - 1, begin
    while k + 8 <= end:
        here, ahead = _eight(rows, k, last, first, width), _eight(rows, k + 16, last, first, width)
        factors = (a[k], a[k + 1], a[k + 2], a[k + 3], a[k + 4], a[k + 5], a[k + 6], a[k + 7])
        for j in range(0, width, line):
            _add_line(y, j, w, here, ahead, factors)
        k += 8
    while k < end:
        here = (first + rows[k] * width,)
        for j in range(0, width, line):
            _add_line(y, j, w, here, here, (a[k],))
        k += 1


@nb.njit(nogil=True)
def dots(w, first, width, scale, x, begin, end, y):
    """`y[i] = scale[i] W[i] · x` for i from `begin` to `end`: `w` holds the rows of W from `first` on, each `width`
    long, as x is."""
    for i in range(begin, end):
        y[i] = scale[i] * _dot(w, first + i * width, x, width)


@nb.njit(nogil=True)
def exp(x):
    """eˣ of a float32 from -87 to 88 (the nearest of these otherwise), to (1 + |x|) · 2e-7 of itself, in a form that
    compilers turn into registers of sixteen: 2ⁿ times the Taylor polynomial of the rest, at most ½ log 2."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.int32(x * np.float32(1.4426950408889634) + (np.float32(0.5) if x >= 0 else np.float32(-0.5)))
    r = x - np.float32(n) * np.float32(0.6931471805599453)
    p = np.float32(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        p = p * r + np.float32(factor)
    return _float_of(np.uint32(float_bits(p) + (np.uint32(n) << np.uint32(23))))


# --- threads ------------------------------------------------------------------------------------------------------


@nb.njit(nogil=True)
def wait(counter, threads):
    """Wait until all threads have come here. The counter only grows; from `ABANDONED` on nobody waits any more."""
    if threads > 1:
        ticket = _arrive(counter)
        target = ticket - ticket % threads + threads
        spins = 0
        while ticket < ABANDONED and _count(counter) < target:
            spins += 1
            if spins > 2000:  # another process has the core of a thread that is waited for
                _let_others_run()


@nb.njit(nogil=True)
def share(n, rank, threads):
    """Which of n a thread does."""
    return n * rank // threads, n * (rank + 1) // threads


# --- selection ----------------------------------------------------------------------------------------------------


@nb.njit(nogil=True, fastmath=FAST)
def _largest(keys, n, count):
    """The `count`-th largest of n keys: bit by bit, as many passes as there are bits, each over whole registers."""
    found = np.uint32(0)
    for bit in range(30, -1, -1):
        trial = np.uint32(found | np.uint32(1 << bit))
        above = 0
        for i in range(n):
            above += keys[i] >= trial
        if above >= count:
            found = trial
    return found


@nb.njit(nogil=True, fastmath=FAST)
def active(z, n, shift, scores, threshold, count, scale, keys, rows, a):
    """Which coordinates `z - shift` stay, as `SparseInput` has it: their numbers into `rows`, their values times
    `scale` into `a`; returns how many. Of a count that is negative the threshold is taken instead. Where several are
    equal and not all of them fit into the count, none of these stays."""
    for i in range(n):
        z[i] -= shift[i]
        keys[i] = float_bits(abs(z[i]) * scores[i])
    if count < 0:
        least = np.uint32(float_bits(max(threshold, np.float32(0))) + np.uint32(threshold >= 0))
    else:
        least = np.uint32(_largest(keys, n, count + 1) + np.uint32(1)) if count < n else np.uint32(0)
    kept = 0
    for i in range(n):
        rows[kept] = i
        a[kept] = z[i] * scale[i]
        kept += (keys[i] >= least) & (z[i] != 0)  # no `and`: a branch that goes either way is slower than both
    return kept
