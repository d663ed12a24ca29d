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

from __future__ import annotations

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
FP16 = tl.constexpr(1)
INT8 = tl.constexpr(3)
HALF = tl.constexpr(32)
"""Bytes of a column of an int4 tile, each of which has a number of row r and one of row r + 32."""


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
    GATED: tl.constexpr,
    STEP: tl.constexpr,
):
    """The same for int4, whose tiles of 64 rows are a program's; ``STEP`` divides every group of columns."""
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
            pairs = (record + tl.load(scales_at + number)).to(tl.pointer_type(tl.bfloat16))
            group = tl.load(groups + number).to(tl.int32)
            byte = tl.arange(0, HALF)
            low = tl.zeros((STEP, HALF), dtype=tl.float32)
            high = tl.zeros((STEP, HALF), dtype=tl.float32)
            for start in range(0, length, STEP):
                at = start + tl.arange(0, STEP)
                v = _inputs(x, i, x_step, width, at, at < length, GATED)[:, None]
                both = tl.load(values + at[:, None] * HALF + byte[None, :]).to(tl.int32)
                first = pairs + ((start // group) * height + begin + byte) * 2
                second = first + 2 * HALF
                scale, zero = tl.load(first).to(tl.float32), tl.load(first + 1).to(tl.float32)
                low += (((both & 15) - 8).to(tl.float32) * scale[None, :] + zero[None, :]) * v
                scale, zero = tl.load(second).to(tl.float32), tl.load(second + 1).to(tl.float32)
                high += (((both >> 4) - 8).to(tl.float32) * scale[None, :] + zero[None, :]) * v
            here = y + i * y_step + begin + byte
            tl.store(here, tl.sum(low, axis=0))
            tl.store(here + HALF, tl.sum(high, axis=0))


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
