"""Attention pooling in Triton. Every sequence is cut into chunks of rows; a chunk's pool is a partial result, and the
partial results of a sequence are merged in a fixed order.

Launches: attention_pool, attention_pool_dot and attention_pool_with_gradient take one kernel over chunks and one that
merges, which is left out where no sequence can have two chunks: one read of `hidden`, and a workspace of at most 1/16
of its bytes. Where the queries of a sequence do not fit into registers together (more than 4, or wide rows; D > 8192),
the first of these is a matrix product. If more than scalars is asked for, it keeps scores, float32 [1 or 2, H, rows],
and a further kernel reads `hidden` a second time for the sums. attention_pool_backward is attention_pool_with_gradient
in the direction of the upstream gradient, three small elementwise launches, and for the gradient of `hidden` one that
only writes it. A scoring micro-batch is so 2 launches, and so is one of training.

Arguments and results as in torch_impl; float64 is not supported. Packed sequence b owns the chunks from
cu_seqlens[b] // CHUNK + b: enough for its length, whatever it is, and their number follows from shapes alone, so the
host never waits for the lengths. Where it has two or more, its partial results are in the workspace's rows from
2 cu_seqlens[b] // CHUNK, so that many short sequences do not make the workspace larger.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2m_kernels.attention_pool import triton_tuning
from r2m_kernels.attention_pool.triton_config import MERGE, OUTER, Config, rows_config, scores_config, sums_config
from r2m_kernels.triton_target import OPTIONS, architecture, on_device_of_arguments

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x LOG2E), and the GPU has an instruction for powers of two
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Vary from call to call: for these a kernel is not compiled anew where they happen to be 1 or divisible by 16.
VARYING = ["B", "S", "total", "partials", "stride_mb"]


@triton.jit
def _locate(chunk, cu_seqlens, B, S, total, CHUNK: tl.constexpr):
    """A chunk's sequence, its number there, and the sequence's first row, length and number of chunks.

    Packed rows behind the last sequence are sequence B, and so are those before the first one, whose chunks are
    numbered from -1. A chunk whose number is too high has nothing to do.
    """
    if cu_seqlens is None:
        each = tl.maximum(tl.cdiv(S, CHUNK), 1)
        b = chunk // each
        number = chunk % each
        first = b.to(tl.int64) * S
        length = S
    else:
        b = 0
        end = B + 1
        while end - b > 1:  # bisects for the last sequence whose first chunk is not after this one
            middle = (b + end) // 2
            if tl.load(cu_seqlens + middle) // CHUNK + middle <= chunk:
                b = middle
            else:
                end = middle
        start = tl.load(cu_seqlens + b)
        number = chunk - (start // CHUNK + b)
        length = tl.load(cu_seqlens + b + 1, mask=b < B, other=total) - start
        first = start.to(tl.int64)
        before = number < 0
        b = tl.where(before, B, b)
        number = tl.where(before, chunk + 1, number)
        length = tl.where(before, start, length)
        first = tl.where(before, 0, first)
    return b, number, first, length, tl.maximum(tl.cdiv(length, CHUNK), 1)


@triton.jit
def _part(cu_seqlens, b, number, first, chunks, CHUNK: tl.constexpr):
    """The workspace's row for a chunk of a sequence of at least two."""
    if cu_seqlens is None:
        return b.to(tl.int64) * chunks + number
    else:
        return 2 * first // CHUNK + number


@triton.jit
def _offset(cu_seqlens, b, first, stride_hb, stride_hs):
    """Where a sequence's rows begin in hidden."""
    if cu_seqlens is None:
        return b.to(tl.int64) * stride_hb
    else:
        return first * stride_hs


@triton.jit
def _counted(mask, stride_ms, o_s, end):
    """Which of the rows o_s of a sequence come before `end` and are not masked."""
    m_s = o_s < end
    if mask is not None:
        m_s = m_s & (tl.load(mask + o_s.to(tl.int64) * stride_ms, mask=m_s, other=0) != 0)
    return m_s


@triton.jit
def _attended(mask, stride_ms, start, end, CHUNK: tl.constexpr, BS: tl.constexpr):
    """The rows from start to end that a mask leaves at both ends; the first is that of a block."""
    if mask is None:
        return start, end
    else:
        o_s = start + tl.arange(0, CHUNK)
        m_s = _counted(mask, stride_ms, o_s, end)  # [CHUNK]
        low = tl.min(tl.where(m_s, o_s, end), 0)
        return start + (low - start) // BS * BS, tl.max(tl.where(m_s, o_s + 1, start), 0)


@triton.jit
def _along(b_x, AXIS: tl.constexpr):
    """A value per query beside values per query and row: [] with [BS] (AXIS 0), or [BH] with [BH, BS] (AXIS 1)."""
    if AXIS == 0:
        return b_x
    else:
        return b_x[:, None]


@triton.jit
def _start(shape: tl.constexpr):
    """The state of an online softmax before its first block."""
    b_0 = tl.zeros(shape, tl.float32)
    return tl.full(shape, float("-inf"), tl.float32), b_0, b_0, b_0


@triton.jit
def _weigh(b_s, b_t, state, DIRECTION: tl.constexpr, AXIS: tl.constexpr):
    """A block of rows in the online softmax: scores s (-inf: no such row) and, with DIRECTION, t = direction . hidden.

    state: m, the largest score; l = sum p with p = exp(s - m); the mean of t under p, as a centre r and what it lacks,
    e = sum p (t - r). Returns the block's p, w = p (t - r) with the r that is the mean with the block, the factor a
    that brings earlier sums to the new m, by how much r moved as d, and the state. So with C = sum p hidden before the
    block, V = (V - d C) a + sum w hidden is sum p (t - r) hidden again: centred at every step, or what all rows have in
    common would cancel digits. A row that outweighs all others is exactly the mean.
    """
    b_m, b_l, b_r, b_e = state
    b_top = tl.max(b_s, AXIS)
    b_new = tl.maximum(b_m, b_top)
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # before the first row: exp(-inf - 0) = 0
    b_a = tl.exp2((b_m - b_safe) * LOG2E)
    b_p = tl.exp2((b_s - _along(b_safe, AXIS)) * LOG2E)
    b_w, b_d = b_p, b_a
    b_l *= b_a
    b_sum = b_l + tl.sum(b_p, AXIS)
    if DIRECTION:
        b_near = tl.max(tl.where(b_s == _along(b_top, AXIS), b_t, float("-inf")), AXIS)
        b_near = tl.where(b_top > b_m, b_near, b_r)
        b_e *= b_a
        b_total = b_e + b_l * (b_r - b_near) + tl.sum(b_p * (b_t - _along(b_near, AXIS)), AXIS)
        b_mean = b_near + b_total / tl.where(b_sum == 0, 1.0, b_sum)
        b_w = b_p * (b_t - _along(b_mean, AXIS))
        b_d = tl.where(b_l == 0, 0.0, b_mean - b_r)
        b_e += tl.sum(b_w, AXIS) - b_d * b_l
        b_r = b_mean
    return b_p, b_w, b_a, b_d, (b_new, b_sum, b_r, b_e)


@triton.jit
def _store_scalars(norm, value, lse, o_x, count, b_m, b_l, b_value, m_x, LSE: tl.constexpr):
    """m and l to norm [2, count], and what else is asked for."""
    tl.store(norm + o_x, b_m, mask=m_x)
    tl.store(norm + count + o_x, b_l, mask=m_x)
    if value is not None:
        tl.store(value + o_x, b_value, mask=m_x)
    if LSE:
        b_lse = b_m + tl.log(tl.where(b_l == 0, 1.0, b_l))  # m is -inf where there is no row
        tl.store(lse + o_x, b_lse, mask=m_x)


@triton.jit
def _store_pool(
    pooled, gradient, value, lse, norm,
    part_pooled, part_gradient, part_value, part_norm,
    part, b, chunks, B, partials, o_h, m_h, o_d, m_d, first_slice,
    state, b_c, b_v,
    H: tl.constexpr, D: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """A chunk's pool: the result of its sequence if that has no other chunk, else a partial result in row `part`."""
    b_m, b_l, b_r, b_e = state
    b_safe = tl.where(b_l == 0, 1.0, b_l)
    b_value = b_r + b_e / b_safe
    o_result = b.to(tl.int64) * H + o_h
    o_partial = part * H + o_h
    if first_slice:
        if chunks == 1:
            _store_scalars(norm, value, lse, o_result, B * H, b_m, b_l, b_value, m_h, True)
        else:
            _store_scalars(part_norm, part_value, lse, o_partial, partials * H, b_m, b_l, b_value, m_h, False)
    if pooled is not None:
        o_result = _along(o_result, AXIS) * D + o_d
        o_partial = _along(o_partial, AXIS) * D + o_d
        b_c /= _along(b_safe, AXIS)
        if chunks == 1:
            tl.store(pooled + o_result, b_c, mask=m_d)
        else:
            tl.store(part_pooled + o_partial, b_c, mask=m_d)
        if gradient is not None:
            b_v = b_v / _along(b_safe, AXIS) - _along(b_e / b_safe, AXIS) * b_c
            if chunks == 1:
                tl.store(gradient + o_result, b_v, mask=m_d)
            else:
                tl.store(part_gradient + o_partial, b_v, mask=m_d)


@triton.jit(do_not_specialize=VARYING)
def _rows_kernel(
    query, hidden, direction, cu_seqlens, mask,
    pooled, gradient, value, lse, norm,
    part_pooled, part_gradient, part_value, part_norm, scores,
    B, S, total, partials,
    stride_gb, stride_gh, stride_gd, stride_hb, stride_hs, stride_hd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program holds H queries and takes whole rows of one chunk, block by block. What is None is not computed."""
    chunk = tl.program_id(0)
    b, number, first, length, chunks = _locate(chunk, cu_seqlens, B, S, total, CHUNK)
    if number >= chunks or b >= B:
        return
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    queries, sums = (), ()  # of every query: itself and its direction; the state of its softmax, C and V
    for h in tl.static_range(H):
        b_u = tl.load(query + (b.to(tl.int64) * H + h) * D + o_d, mask=m_d, other=0.0)  # [BD]
        b_g = b_u
        if direction is not None:
            o_g = b.to(tl.int64) * stride_gb + h * stride_gh + o_d * stride_gd
            b_g = tl.load(direction + o_g, mask=m_d, other=0.0)  # [BD]
        queries += ((b_u, b_g),)
        sums += ((_start([]), tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)),)

    hidden += _offset(cu_seqlens, b, first, stride_hb, stride_hs)
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    start = number * CHUNK
    end = tl.minimum(start + CHUNK, length)
    low, high = _attended(mask, stride_ms, start, end, CHUNK, BS)
    for i in tl.range(low, high, BS, num_stages=STAGES):
        o_s = i + tl.arange(0, BS)
        m_s = _counted(mask, stride_ms, o_s, high)
        o_x = o_s.to(tl.int64)[:, None] * stride_hs + o_d.to(tl.int64)[None, :] * stride_hd
        b_h = tl.load(hidden + o_x, mask=m_s[:, None] & m_d[None, :], other=0.0, eviction_policy="evict_first")
        b_h = b_h.to(tl.float32)  # [BS, BD]
        updated = ()
        for h in tl.static_range(H):
            b_u, b_g = queries[h]
            state, b_c, b_v = sums[h]
            b_s = tl.sum(b_u[None, :] * b_h, 1)  # [BS]
            b_t = b_s
            if direction is not None:
                b_t = tl.sum(b_g[None, :] * b_h, 1)  # [BS]
            if scores is not None:
                tl.store(scores + h * total.to(tl.int64) + first + o_s, b_s, mask=m_s)
                tl.store(scores + (H + h) * total.to(tl.int64) + first + o_s, b_t, mask=m_s)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_p, b_w, b_a, b_d, state = _weigh(b_s, b_t, state, direction is not None, 0)
            if gradient is not None:
                b_v = (b_v - b_d * b_c) * b_a + tl.sum(b_w[:, None] * b_h, 0)  # [BD]
            if pooled is not None:
                b_c = b_c * b_a + tl.sum(b_p[:, None] * b_h, 0)  # [BD]
            updated += ((state, b_c, b_v),)
        sums = updated

    part = _part(cu_seqlens, b, number, first, chunks, CHUNK)
    for h in tl.static_range(H):
        state, b_c, b_v = sums[h]
        _store_pool(
            pooled, gradient, value, lse, norm, part_pooled, part_gradient, part_value, part_norm,
            part, b, chunks, B, partials, h, True, o_d, m_d, True, state, b_c, b_v, H, D, 0,
        )  # fmt: skip


@triton.jit
def _product(b_x, b_h, b_sum):
    """b_sum + b_x @ b_h to float32's precision: bfloat16 b_h meets the three bfloat16 parts of b_x on tensor cores."""
    if b_h.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            b_part = b_x.to(tl.bfloat16)
            if INTERPRETED:  # its matrix product takes bfloat16 for integers
                b_sum = tl.dot(b_part.to(tl.float32), b_h.to(tl.float32), b_sum)
            else:
                b_sum = tl.dot(b_part, b_h, b_sum)
            b_x -= b_part.to(tl.float32)
        return b_sum
    else:
        return tl.dot(b_x, b_h.to(tl.float32), b_sum, input_precision="ieee")


@triton.jit(do_not_specialize=VARYING)
def _scores_kernel(
    query, hidden, direction, cu_seqlens, mask,
    value, lse, norm, part_value, part_norm, scores,
    B, S, total, partials,
    stride_gb, stride_gh, stride_gd, stride_hb, stride_hs, stride_hd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program multiplies BS rows with BH queries and directions: to scores [forms, H, total] or a pool's scalars."""
    chunk = tl.program_id(0)
    b, number, first, length, chunks = _locate(chunk, cu_seqlens, B, S, total, BS)
    if number >= chunks or b >= B:
        return
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < H
    o_s = number * BS + tl.arange(0, BS)
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    m_s = _counted(mask, stride_ms, o_s, length)
    hidden += _offset(cu_seqlens, b, first, stride_hb, stride_hs)
    width = tl.where(tl.max(m_s.to(tl.int32), 0) > 0, D, 0)  # nothing is read where no row counts
    b_s = tl.zeros([BH, BS], tl.float32)
    b_t = tl.zeros([BH, BS], tl.float32)
    for k in tl.range(0, width, BD, num_stages=STAGES):
        o_d = k + tl.arange(0, BD)
        m_d = o_d < D
        o_x = o_s.to(tl.int64)[:, None] * stride_hs + o_d.to(tl.int64)[None, :] * stride_hd
        b_h = tl.load(hidden + o_x, mask=m_s[:, None] & m_d[None, :], other=0.0, eviction_policy="evict_first")
        m_u = m_h[:, None] & m_d[None, :]
        b_u = tl.load(query + (b.to(tl.int64) * H + o_h)[:, None] * D + o_d[None, :], mask=m_u, other=0.0)  # [BH, BD]
        b_s = _product(b_u, tl.trans(b_h), b_s)
        if direction is not None:
            o_g = b.to(tl.int64) * stride_gb + o_h[:, None] * stride_gh + o_d[None, :] * stride_gd
            b_t = _product(tl.load(direction + o_g, mask=m_u, other=0.0), tl.trans(b_h), b_t)
    if scores is not None:
        o_x = o_h.to(tl.int64)[:, None] * total + first + o_s[None, :]
        m_x = m_h[:, None] & m_s[None, :]
        tl.store(scores + o_x, b_s, mask=m_x)
        if direction is not None:
            tl.store(scores + total.to(tl.int64) * H + o_x, b_t, mask=m_x)
    else:
        b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        _, _, _, _, state = _weigh(b_s, b_t, _start([BH]), True, 1)
        _store_pool(
            None, None, value, lse, norm, None, None, part_value, part_norm,
            _part(cu_seqlens, b, number, first, chunks, BS), b, chunks, B, partials, o_h, m_h, None, None, True,
            state, None, None, H, D, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _sums_kernel(
    scores, hidden, cu_seqlens, mask,
    pooled, gradient, value, lse, norm,
    part_pooled, part_gradient, part_value, part_norm,
    B, S, total, partials,
    stride_hb, stride_hs, stride_hd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program sums BD columns of one chunk for BH queries whose scores are known."""
    chunk = tl.program_id(0)
    b, number, first, length, chunks = _locate(chunk, cu_seqlens, B, S, total, CHUNK)
    if number >= chunks or b >= B:
        return
    o_h = tl.program_id(2) * BH + tl.arange(0, BH)
    m_h = o_h < H
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    hidden += _offset(cu_seqlens, b, first, stride_hb, stride_hs)
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    state = _start([BH])
    b_c = tl.zeros([BH, BD], tl.float32)
    b_v = tl.zeros([BH, BD], tl.float32)
    start = number * CHUNK
    end = tl.minimum(start + CHUNK, length)
    low, high = _attended(mask, stride_ms, start, end, CHUNK, BS)
    for i in tl.range(low, high, BS, num_stages=STAGES):
        o_s = i + tl.arange(0, BS)
        m_s = _counted(mask, stride_ms, o_s, high)
        o_x = o_s.to(tl.int64)[:, None] * stride_hs + o_d.to(tl.int64)[None, :] * stride_hd
        b_h = tl.load(hidden + o_x, mask=m_s[:, None] & m_d[None, :], other=0.0, eviction_policy="evict_first")
        o_x = o_h.to(tl.int64)[:, None] * total + first + o_s[None, :]
        m_x = m_h[:, None] & m_s[None, :]
        b_s = tl.load(scores + o_x, mask=m_x, other=float("-inf"))  # [BH, BS]
        b_t = b_s
        if gradient is not None:
            b_t = tl.load(scores + total.to(tl.int64) * H + o_x, mask=m_x, other=0.0)  # [BH, BS]
        b_p, b_w, b_a, b_d, state = _weigh(b_s, b_t, state, gradient is not None, 1)
        if gradient is not None:
            b_v = _product(b_w, b_h, (b_v - b_d[:, None] * b_c) * b_a[:, None])  # [BH, BD]
        b_c = _product(b_p, b_h, b_c * b_a[:, None])  # [BH, BD]
    _store_pool(
        pooled, gradient, value, lse, norm, part_pooled, part_gradient, part_value, part_norm,
        _part(cu_seqlens, b, number, first, chunks, CHUNK), b, chunks, B, partials,
        o_h, m_h, o_d[None, :], m_h[:, None] & m_d[None, :], tl.program_id(1) == 0,
        state, b_c, b_v, H, D, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _merge_kernel(
    part_pooled, part_gradient, part_value, part_norm,
    pooled, gradient, value, lse, norm, cu_seqlens,
    B, S, partials,
    H: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program merges BD columns of the partial results of one query, BC at a time.

    With shares a of the parts: t = sum a t_i, c = sum a c_i, V = sum a (V_i + (t_i - t) (c_i - c)), centred at the
    part with the largest score.
    """
    b = tl.program_id(0) // H
    h = tl.program_id(0) % H
    if cu_seqlens is None:
        first = b.to(tl.int64) * S
        chunks = tl.cdiv(S, CHUNK)
    else:
        first = tl.load(cu_seqlens + b).to(tl.int64)
        chunks = tl.cdiv(tl.load(cu_seqlens + b + 1) - first, CHUNK).to(tl.int32)
    if chunks <= 1:
        return
    part = _part(cu_seqlens, b, 0, first, chunks, CHUNK) * H + h  # and H further for every next chunk
    count = partials.to(tl.int64) * H
    o_c = tl.arange(0, BC)

    b_top = tl.full([BC], float("-inf"), tl.float32)
    b_at = tl.zeros([BC], tl.int32)
    for i in range(0, chunks, BC):
        b_m = tl.load(part_norm + part + (i + o_c).to(tl.int64) * H, mask=i + o_c < chunks, other=float("-inf"))  # [BC]
        b_at = tl.where(b_m > b_top, i + o_c, b_at)
        b_top = tl.maximum(b_top, b_m)
    b_m_all = tl.max(b_top, 0)
    b_safe = tl.where(b_m_all == float("-inf"), 0.0, b_m_all)
    anchor = part + tl.max(tl.where(b_top == b_m_all, b_at, 0), 0).to(tl.int64) * H

    b_r = 0.0
    if value is not None:
        b_r = tl.load(part_value + anchor)
    b_l = tl.zeros([BC], tl.float32)
    b_x = tl.zeros([BC], tl.float32)
    for i in range(0, chunks, BC):
        m_c = i + o_c < chunks
        o_x = part + (i + o_c).to(tl.int64) * H
        b_m = tl.load(part_norm + o_x, mask=m_c, other=float("-inf"))  # [BC]
        b_share = tl.load(part_norm + count + o_x, mask=m_c, other=0.0) * tl.exp2((b_m - b_safe) * LOG2E)  # [BC]
        b_l += b_share
        if value is not None:
            b_x += b_share * (tl.load(part_value + o_x, mask=m_c, other=0.0) - b_r)
    b_l_all = tl.sum(b_l, 0)
    b_l_safe = tl.where(b_l_all == 0, 1.0, b_l_all)
    b_t = b_r + tl.sum(b_x, 0) / b_l_safe
    result = b.to(tl.int64) * H + h
    if tl.program_id(1) == 0:
        _store_scalars(norm, value, lse, result, B * H, b_m_all, b_l_all, b_t, True, True)

    if pooled is not None:
        o_d = tl.program_id(1) * BD + tl.arange(0, BD)
        m_d = o_d < D
        b_0 = tl.load(part_pooled + anchor * D + o_d, mask=m_d, other=0.0)  # [BD]
        b_c = tl.zeros([BD], tl.float32)
        b_v = tl.zeros([BD], tl.float32)
        b_x = tl.zeros([BC], tl.float32)
        for i in range(0, chunks, BC):
            m_c = i + o_c < chunks
            o_x = part + (i + o_c).to(tl.int64) * H
            b_m = tl.load(part_norm + o_x, mask=m_c, other=float("-inf"))
            b_share = tl.load(part_norm + count + o_x, mask=m_c, other=0.0) * tl.exp2((b_m - b_safe) * LOG2E)
            b_share /= b_l_safe
            m_x = m_c[:, None] & m_d[None, :]
            b_ci = tl.load(part_pooled + o_x[:, None] * D + o_d[None, :], mask=m_x, other=0.0)  # [BC, BD]
            b_ci -= b_0[None, :]
            b_c += tl.sum(b_share[:, None] * b_ci, 0)
            if gradient is not None:
                b_vi = tl.load(part_gradient + o_x[:, None] * D + o_d[None, :], mask=m_x, other=0.0)  # [BC, BD]
                b_ti = tl.load(part_value + o_x, mask=m_c, other=0.0) - b_t  # [BC]
                b_v += tl.sum(b_share[:, None] * (b_vi + b_ti[:, None] * b_ci), 0)
                b_x += b_share * b_ti  # 0 but for rounding
        tl.store(pooled + result * D + o_d, b_0 + b_c, mask=m_d)
        if gradient is not None:
            tl.store(gradient + result * D + o_d, b_v - tl.sum(b_x, 0) * b_c, mask=m_d)


@triton.jit(do_not_specialize=VARYING)
def _outer_kernel(
    scores, query, direction, norm, value, grad_lse, cu_seqlens, mask, grad_hidden,
    B, S, total,
    stride_gb, stride_gh, stride_gd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of hidden: the sum over queries of p_j (t_j - t + dlse) u + p_j dc, 0 in rows that do not count."""
    block = tl.program_id(0)
    if cu_seqlens is not None:
        block -= 1  # rows before the first sequence
    b, number, first, length, blocks = _locate(block, cu_seqlens, B, S, total, BS)
    if number >= blocks:
        return
    o_s = number * BS + tl.arange(0, BS)
    m_s = o_s < length
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    m_a = _counted(mask, stride_ms, o_s, tl.where(b < B, length, 0))
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_u = o_d < tl.where(b < B, D, 0)
    b_dh = tl.zeros([BS, BD], tl.float32)
    for h in range(H):
        o_x = b.to(tl.int64) * H + h
        b_m = tl.load(norm + o_x, mask=b < B, other=0.0)
        b_l = tl.load(norm + B * H + o_x, mask=b < B, other=1.0)
        b_t = tl.load(value + o_x, mask=b < B, other=0.0)
        b_dlse = tl.load(grad_lse + o_x, mask=b < B, other=0.0)
        o_j = h * total.to(tl.int64) + first + o_s
        b_p = tl.exp2((tl.load(scores + o_j, mask=m_a, other=0.0) - b_m) * LOG2E) / b_l  # [BS]
        b_tj = tl.load(scores + total.to(tl.int64) * H + o_j, mask=m_a, other=0.0)
        b_ds = b_p * (b_tj - b_t + b_dlse)  # [BS]
        b_u = tl.load(query + o_x * D + o_d, mask=m_u, other=0.0)  # [BD]
        o_g = b.to(tl.int64) * stride_gb + h * stride_gh + o_d * stride_gd
        b_g = tl.load(direction + o_g, mask=m_u, other=0.0)  # [BD]
        b_dh += b_ds[:, None] * b_u[None, :] + b_p[:, None] * b_g[None, :]
    b_dh = tl.where(m_a[:, None], b_dh, 0.0).to(grad_hidden.dtype.element_ty)
    tl.store(grad_hidden + (first + o_s)[:, None] * D + o_d[None, :], b_dh, mask=m_s[:, None] & m_d[None, :])


@on_device_of_arguments
def attention_pool(query: Tensor, hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, ...]:
    pooled, _, _, lse, _, _ = _pool(query, hidden, None, cu_seqlens, mask)
    return pooled, lse


@on_device_of_arguments
def attention_pool_dot(
    query: Tensor, hidden: Tensor, direction: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    _, _, value, lse, _, _ = _pool(query, hidden, direction, cu_seqlens, mask, vectors=False)
    return value, lse


@on_device_of_arguments
def attention_pool_with_gradient(
    query: Tensor, hidden: Tensor, direction: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ...]:
    pooled, gradient, _, lse, _, _ = _pool(query, hidden, direction, cu_seqlens, mask)
    return pooled, gradient, lse


@on_device_of_arguments
def attention_pool_backward(
    query: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    grad_pooled: Tensor,
    grad_lse: Tensor,
    needs_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """dquery = Cov_p(hidden) dc + dlse c, whose first term is attention_pool_with_gradient's in the direction dc."""
    _, gradient, value, _, norm, scores = _pool(query, hidden, grad_pooled, cu_seqlens, mask, keep_scores=needs_hidden)
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0)  # nothing flows into an empty pool, whatever comes from above
    grad_query = torch.addcmul(gradient, grad_lse[..., None], pooled)
    if not needs_hidden:
        return grad_query, hidden.new_empty(0)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    B, H, D = query.shape
    if hidden.numel():
        blocks = _chunks(hidden, cu_seqlens, B, OUTER["BS"])
        blocks += 0 if cu_seqlens is None else 2  # rows before the first sequence, and behind the last one
        _outer_kernel[blocks, triton.cdiv(D, OUTER["BD"])](
            scores, query.contiguous(), grad_pooled, norm, value, grad_lse, cu_seqlens, mask, grad_hidden,
            B, *_rows(hidden), *grad_pooled.stride(), *_strides(mask), H=H, D=D, **OUTER, **OPTIONS,
        )  # fmt: skip
    return grad_query, grad_hidden


def _pool(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    vectors: bool = True,
    keep_scores: bool = False,
) -> tuple[Any, ...]:
    """pooled, gradient, value, lse, norm [2, B, H] (m and l, see _weigh) and scores; None where not asked for."""
    B, H, D = query.shape
    query = query.contiguous()
    new = query.new_empty
    pooled = new(B, H, D) if vectors else None
    gradient = new(B, H, D) if vectors and direction is not None else None
    value = new(B, H) if direction is not None else None
    lse, norm = new(B, H), new(2, B, H)
    case = H, D, hidden.dtype, vectors, direction is not None, architecture()
    rows = rows_config(*case)
    keep_scores = keep_scores or (vectors and rows is None)
    scores = new(1 if direction is None else 2, H, _rows(hidden)[1]) if keep_scores else None
    results = pooled, gradient, value, lse, norm
    if query.numel():
        launch = functools.partial(_launch, query, hidden, direction, cu_seqlens, mask, results, scores)
        if rows is not None and triton_tuning.enabled():
            rows = triton_tuning.tuned(case, rows, launch)
        launch(rows)
    return *results, scores


def _launch(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    results: tuple[Tensor | None, ...],
    scores: Tensor | None,
    rows: Config | None,
) -> None:
    """Fills results (pooled, gradient, value, lse, norm) and scores: with whole rows a program if `rows` says how."""
    B, H, D = query.shape
    S, total = _rows(hidden)
    pooled, gradient, value, lse, norm = results
    if rows is None:
        case = H, hidden.dtype, direction is not None, architecture()
        by_heads, by_slices = scores_config(*case), sums_config(*case)
        chunk = by_heads["BS"] if pooled is None else by_slices["CHUNK"]
    else:
        chunk = rows["CHUNK"]
    chunks = _chunks(hidden, cu_seqlens, B, chunk)
    partials = chunks if cu_seqlens is None else 2 * total // chunk
    if (S if cu_seqlens is None else total) <= chunk:
        partials = 0  # no sequence has a second chunk
    part_pooled = None if pooled is None else query.new_empty(partials, H, D)
    part_gradient = None if gradient is None else query.new_empty(partials, H, D)
    part_value = None if value is None else query.new_empty(partials, H)
    part_norm = query.new_empty(2, partials, H)
    sizes = B, S, total, partials
    strides_g = (0, 0, 0) if direction is None else direction.stride()
    strides = *_strides_of_hidden(hidden), *_strides(mask)

    if rows is not None:
        _rows_kernel[(chunks,)](
            query, hidden, direction, cu_seqlens, mask, *results,
            part_pooled, part_gradient, part_value, part_norm, scores, *sizes, *strides_g, *strides,
            H=H, D=D, **rows, **OPTIONS,
        )  # fmt: skip
    else:
        groups = triton.cdiv(H, by_heads["BH"])
        _scores_kernel[_chunks(hidden, cu_seqlens, B, by_heads["BS"]), groups](
            query, hidden, direction, cu_seqlens, mask, value, lse, norm,
            part_value, part_norm, scores, *sizes, *strides_g, *strides,
            H=H, D=D, **by_heads, **OPTIONS,
        )  # fmt: skip
        if pooled is not None:
            _sums_kernel[chunks, triton.cdiv(D, by_slices["BD"]), groups](
                scores, hidden, cu_seqlens, mask, *results,
                part_pooled, part_gradient, part_value, part_norm, *sizes, *strides,
                H=H, D=D, **by_slices, **OPTIONS,
            )  # fmt: skip
    if partials:
        _merge_kernel[B * H, 1 if pooled is None else triton.cdiv(D, MERGE["BD"])](
            part_pooled, part_gradient, part_value, part_norm, *results, cu_seqlens,
            B, S, partials, H=H, D=D, CHUNK=chunk, **MERGE, **OPTIONS,
        )  # fmt: skip


def _chunks(hidden: Tensor, cu_seqlens: Tensor | None, batch: int, size: int) -> int:
    """Enough chunks of `size` rows for sequences of any lengths."""
    if cu_seqlens is None:
        return batch * max(triton.cdiv(hidden.shape[1], size), 1)
    return hidden.shape[0] // size + batch


def _rows(hidden: Tensor) -> tuple[int, int]:
    """Rows of a dense sequence (0 for packed ones), and of all sequences together."""
    return (hidden.shape[1], hidden.shape[0] * hidden.shape[1]) if hidden.ndim == 3 else (0, hidden.shape[0])


def _strides_of_hidden(hidden: Tensor) -> tuple[int, ...]:
    return hidden.stride() if hidden.ndim == 3 else (0, *hidden.stride())


def _strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else mask.stride()
