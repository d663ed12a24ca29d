"""Kernels for one token on a GPU, in Triton: they read the prototypes where they lie, in the form in which they lie.

Experimental (see ``launch.py``, which alone calls them); importing this needs Triton. ``base`` has the address of every
prototype's record, and the other tables what lies where in it, so a kernel finds a prototype by its number and nothing
is gathered before.

An expert is two launches: its gate and up rows, and its down rows, which make silu(gate) * up of what the first has
written as they read it. Programs are (block of rows, prototype); a prototype that is not wanted ends at once. Every row
is summed in fp32 by one program, in an order that its shape decides: the same bits in any company.
"""

# Triton's language is no Python to a type checker.
# pyright: basic, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
INT8 = tl.constexpr(3)
MXFP4 = tl.constexpr(5)
HALF = tl.constexpr(32)
"""Bytes of a column of a tile of int4 or mxfp4, each of which has a number of row r and one of row r + 32."""
GROUP = tl.constexpr(32)
"""Columns that share a byte of scales where numbers lie in planes."""


@triton.jit
def merge(
    slots,
    gates,
    target,
    factor,
    numbers,
    weights,
    asked,
    chosen,
    count,
    SCALED: tl.constexpr,
    COUNTED: tl.constexpr,
    ROOM: tl.constexpr,
):
    """What meets on a prototype is added in fp64: ``numbers`` [chosen] ascending, -1 behind the last; ``weights``."""
    i = tl.arange(0, ROOM)
    there = i < chosen
    slot = tl.load(slots + i, mask=there, other=-1)
    inside = (slot >= 0) & (slot < count)
    number = tl.load(target + slot, mask=inside, other=-1)
    weight = tl.load(gates + i, mask=there, other=0.0).to(tl.float64)
    if SCALED:
        weight *= tl.load(factor + slot, mask=inside, other=0.0).to(tl.float64)
    same = ((number[:, None] == number[None, :]) & (number >= 0)[None, :]).to(tl.int32)
    total = tl.sum(tl.where(same != 0, weight[None, :], 0.0), axis=1)
    earlier = tl.where(i[None, :] < i[:, None], same, 0)
    first = ((number >= 0) & (tl.sum(earlier, axis=1) == 0)).to(tl.int32)
    smaller = (number[None, :] < number[:, None]).to(tl.int32)
    rank = tl.sum(smaller * first[None, :], axis=1)
    distinct = tl.sum(first, axis=0)
    tl.store(numbers + i, tl.zeros_like(number) - 1, mask=there & (i >= distinct))
    tl.store(numbers + rank, number, mask=first != 0)
    tl.store(weights + rank, total.to(tl.float32), mask=first != 0)
    if COUNTED:
        tl.atomic_add(asked, distinct.to(tl.int64))


@triton.jit
def _inputs(x, i, step, width, at, inside, GATED: tl.constexpr):
    """What columns ``at`` of a matrix are multiplied with: the token, or what gate and up rows make."""
    if GATED:
        gate = tl.load(x + i * step + at, mask=inside, other=0.0)
        up = tl.load(x + i * step + width + at, mask=inside, other=0.0)
        found = gate / (1.0 + tl.exp(-gate)) * up
    else:
        found = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit(do_not_specialize=["wanted"])
def rows(
    numbers,
    wanted,
    base,
    values_at,
    scales_at,
    widths,
    x,
    x_step,
    y,
    y_step,
    hidden,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """y[i] = W_i x, fp32, for matrices whose rows lie one after another.

    Gate and up rows [2 * width, hidden] of the token ``x`` [hidden]; where ``GATED``, down rows [hidden, width] of
    silu(gate) * up, with ``x`` [., x_step] the outputs of the former.
    """
    i = tl.program_id(1)
    number = tl.load(numbers + i)
    if (number >= 0) & (((wanted >> i) & 1) != 0):
        width = tl.multiple_of(tl.load(widths + number).to(tl.int32), 16)
        height = hidden if GATED else 2 * width
        length = width if GATED else hidden
        begin = tl.program_id(0) * ROWS
        if begin < height:
            record = tl.load(base + number)
            place = record + tl.load(values_at + number)
            row = begin + tl.arange(0, ROWS)
            total = tl.zeros((ROWS, STEP), dtype=tl.float32)
            for start in range(0, length, STEP):
                at = start + tl.arange(0, STEP)
                inside = at < length
                v = _inputs(x, i, x_step, width, at, inside, GATED)
                where = row[:, None] * length + at[None, :]
                mask = (row < height)[:, None] & inside[None, :]
                if KIND == BF16:
                    values = tl.multiple_of(place.to(tl.pointer_type(tl.bfloat16)), 16)
                elif KIND == FP16:
                    values = tl.multiple_of(place.to(tl.pointer_type(tl.float16)), 16)
                else:
                    values = tl.multiple_of(place.to(tl.pointer_type(tl.int8)), 16)
                w = tl.load(values + where, mask=mask, other=0)
                total += w.to(tl.float32) * v[None, :]
            sums = tl.sum(total, axis=1)
            if KIND == INT8:
                scales = (record + tl.load(scales_at + number)).to(tl.pointer_type(tl.bfloat16))
                sums *= tl.load(scales + row, mask=row < height, other=0).to(tl.float32)
            tl.store(y + i * y_step + row, sums, mask=row < height)


@triton.jit
def _e2m1(code):
    """Twice what the four bits of an mxfp4 number stand for."""
    size = code & 7
    whole = tl.where(size < 2, size, (2 + (size & 1)) << tl.maximum((size >> 1) - 1, 0))
    return tl.where((code & 8) != 0, -whole, whole).to(tl.float32)


@triton.jit
def _powers(places):
    """Half of 2^(e - 127) for bytes e: the other half is in ``_e2m1``."""
    exponents = tl.load(places).to(tl.int32)
    return tl.maximum(exponents << 23, 1 << 22).to(tl.float32, bitcast=True) * 0.5


@triton.jit(do_not_specialize=["wanted"])
def tiles(
    numbers,
    wanted,
    base,
    values_at,
    scales_at,
    widths,
    groups,
    x,
    x_step,
    y,
    y_step,
    hidden,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    STEP: tl.constexpr,
):
    """The same for int4 and mxfp4, whose tiles of 64 rows are a program's; ``STEP`` divides every group of columns."""
    i = tl.program_id(1)
    number = tl.load(numbers + i)
    if (number >= 0) & (((wanted >> i) & 1) != 0):
        width = tl.multiple_of(tl.load(widths + number).to(tl.int32), 16)
        height = hidden if GATED else 2 * width
        length = width if GATED else hidden
        begin = tl.program_id(0) * 2 * HALF
        if begin < height:
            record = tl.load(base + number)
            place = record + tl.load(values_at + number) + begin * (length // 2)
            values = tl.multiple_of(place.to(tl.pointer_type(tl.uint8)), 16)
            scales = record + tl.load(scales_at + number)
            group = tl.load(groups + number).to(tl.int32)
            byte = tl.arange(0, HALF)
            low = tl.zeros((STEP, HALF), dtype=tl.float32)
            high = tl.zeros((STEP, HALF), dtype=tl.float32)
            for start in range(0, length, STEP):
                at = start + tl.arange(0, STEP)
                v = _inputs(x, i, x_step, width, at, at < length, GATED)[:, None]
                both = tl.load(values + at[:, None] * HALF + byte[None, :]).to(tl.int32)
                row = (start // group) * height + begin + byte
                if KIND == MXFP4:
                    first = scales.to(tl.pointer_type(tl.uint8)) + row
                    low += _e2m1(both & 15) * _powers(first)[None, :] * v
                    high += _e2m1(both >> 4) * _powers(first + HALF)[None, :] * v
                else:
                    first = scales.to(tl.pointer_type(tl.bfloat16)) + row * 2
                    second = first + 2 * HALF
                    scale, zero = tl.load(first).to(tl.float32), tl.load(first + 1).to(tl.float32)
                    low += (((both & 15) - 8).to(tl.float32) * scale[None, :] + zero[None, :]) * v
                    scale, zero = tl.load(second).to(tl.float32), tl.load(second + 1).to(tl.float32)
                    high += (((both >> 4) - 8).to(tl.float32) * scale[None, :] + zero[None, :]) * v
            here = y + i * y_step + begin + byte
            tl.store(here, tl.sum(low, axis=0))
            tl.store(here + HALF, tl.sum(high, axis=0))


@triton.jit(do_not_specialize=["wanted"])
def planes(
    numbers,
    wanted,
    base,
    values_at,
    scales_at,
    widths,
    x,
    x_step,
    y,
    y_step,
    hidden,
    BITS: tl.constexpr,
    GATED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The same for numbers of ``BITS`` bits in planes (``low_bits.py``); ``GROUPS`` groups of columns are read at once.

    A weight is S s (q - c) + Z (z - 8), so a row is S times the sum over groups of s (sum of q x, less c times that of
    x), and Z times the sum of (z - 8) times that of x. A word of the lower plane has every fourth column of a row four
    times or, in 4 bits, twice.
    """
    PLANE: tl.constexpr = 4 if BITS == 4 else 2
    INSIDE: tl.constexpr = 8 // PLANE
    WORDS: tl.constexpr = GROUP // (4 * INSIDE)
    i = tl.program_id(1)
    number = tl.load(numbers + i)
    if (number >= 0) & (((wanted >> i) & 1) != 0):
        width = tl.multiple_of(tl.load(widths + number).to(tl.int32), 16)
        height = hidden if GATED else 2 * width
        length = width if GATED else hidden
        begin = tl.program_id(0) * 2 * HALF
        if begin < height:
            record = tl.load(base + number)
            place = record + tl.load(values_at + number) + begin * (length // 8 * BITS)
            values = tl.multiple_of(place.to(tl.pointer_type(tl.int32)), 16)
            head = record + tl.load(scales_at + number)
            row = begin + tl.arange(0, 2 * HALF)
            steps = head.to(tl.pointer_type(tl.uint8)) + (4 * height + row)[None, :]
            word = tl.arange(0, WORDS)
            stepped = tl.zeros((GROUPS, WORDS, 2 * HALF), dtype=tl.float32)
            shifted = tl.zeros((GROUPS, WORDS, 2 * HALF), dtype=tl.float32)
            for start in range(0, length // GROUP, GROUPS):
                group = start + tl.arange(0, GROUPS)
                inside = group < length // GROUP
                block = group * (2 * HALF * BITS)
                lower = (block[:, None] + word[None, :] * (2 * HALF))[:, :, None] + tl.arange(
                    0, 2 * HALF
                )[None, None, :]
                low = tl.load(values + lower, mask=inside[:, None, None], other=0)
                if BITS == 3:
                    upper = (block + WORDS * 2 * HALF)[:, None] + tl.arange(0, 2 * HALF)[None, :]
                    high = tl.load(values + upper, mask=inside[:, None], other=0)[:, None, :]
                sums = tl.zeros((GROUPS, WORDS, 2 * HALF), dtype=tl.float32)
                inputs = tl.zeros((GROUPS, WORDS), dtype=tl.float32)
                for inner in tl.static_range(4 * INSIDE):
                    j, b = inner // 4, inner % 4
                    q = (low >> (PLANE * j + 8 * b)) & ((1 << PLANE) - 1)
                    if BITS == 3:
                        q += ((high >> (word[None, :, None] * INSIDE + j + 8 * b)) & 1) << 2
                    at = group[:, None] * GROUP + word[None, :] * (4 * INSIDE) + inner
                    v = _inputs(x, i, x_step, width, at, inside[:, None], GATED)
                    sums += q.to(tl.float32) * v[:, :, None]
                    inputs += v
                both = tl.load(steps + group[:, None] * height, mask=inside[:, None], other=0).to(
                    tl.int32
                )[:, None, :]
                middle = ((1 << BITS) - 1) / 2
                stepped += (both & 15).to(tl.float32) * (sums - middle * inputs[:, :, None])
                shifted += ((both >> 4) - 8).to(tl.float32) * inputs[:, :, None]
            pairs = head.to(tl.pointer_type(tl.bfloat16)) + row * 2
            scale, zero = tl.load(pairs).to(tl.float32), tl.load(pairs + 1).to(tl.float32)
            total = tl.sum(tl.sum(stepped, axis=0), axis=0) * scale
            total += tl.sum(tl.sum(shifted, axis=0), axis=0) * zero
            tl.store(y + i * y_step + row, total)


@triton.jit
def combine(
    numbers,
    weights,
    y,
    hidden,
    slots,
    gates,
    constant_of,
    constants,
    out,
    chosen,
    count,
    CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = sum over prototypes of weights[i] * y[i], then over slots of gate * constant, in their orders, in fp32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(chosen):
        if tl.load(numbers + i) >= 0:
            weight = tl.load(weights + i)
            total += weight * tl.load(y + i * hidden + at, mask=inside, other=0.0)
    if CONSTANTS:
        for i in range(chosen):
            slot = tl.load(slots + i)
            if (slot >= 0) & (slot < count):
                row = tl.load(constant_of + slot)
                if row >= 0:
                    gate = tl.load(gates + i).to(tl.float32)
                    total += gate * tl.load(constants + row * hidden + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
