"""The Triton kernels of attention pooling; triton_impl.py launches them, triton_softmax.py has what they share.

Packed sequence b owns the chunks from cu_seqlens[b] // CHUNK + b: enough for its length, whatever it is, and their
number follows from shapes alone, so the host never waits for the lengths. Where it has two or more, its partial
results are in the workspace's rows from 2 cu_seqlens[b] // CHUNK: many short sequences do not make that larger.
"""

import triton
import triton.language as tl

from r2m_kernels.attention_pool.triton_softmax import (
    LOG2E,
    add_block,
    attended,
    attended_bits,
    block_of,
    counted,
    locate,
    no_rows,
    offset_of,
    part_of,
    product,
    store_pool,
    store_scalars,
    sum_both,
    weigh,
)

# Vary from call to call: for these a kernel is not compiled anew where they happen to be 1 or divisible by 16. Strides
# of hidden are in units of UNIT numbers: where these are 16 bytes, the compiler knows that rows can be loaded 128 bits
# at a time.
VARYING = ["B", "S", "total", "partials", "stride_mb", "stride_hb", "stride_hs"]


@triton.jit(do_not_specialize=VARYING)
def rows_kernel(
    query, hidden, direction, cu_seqlens, mask,
    pooled, gradient, value, lse, max_sum,
    part_pooled, part_gradient, part_value, part_max_sum, scores,
    B, S, total, partials,
    stride_gb, stride_gh, stride_gd, stride_hb, stride_hs, stride_hd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program holds H queries and takes whole rows of one chunk, block by block. What is None is not computed.

    A row is ND pieces of BD columns, so that a width that is no power of two wastes less than one piece.
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    chunk = tl.program_id(0)
    b, number, first, length, chunks = locate(chunk, cu_seqlens, B, S, total, CHUNK)
    if number >= chunks or b >= B:
        return
    o_b = tl.arange(0, BD)
    # Of every query: its pieces and its direction's; the state of its softmax; pieces of C and of V.
    queries, directions, states, pools, gradients = (), (), (), (), ()
    for h in tl.static_range(H):
        states += (no_rows([]),)
        for d in tl.static_range(ND):
            o_d = d * BD + o_b
            b_u = tl.load(query + (b.to(tl.int64) * H + h) * D + o_d, mask=o_d < D, other=0.0)  # [BD]
            queries += (b_u,)
            if direction is not None:
                o_g = b.to(tl.int64) * stride_gb + h * stride_gh + o_d * stride_gd
                directions += (tl.load(direction + o_g, mask=o_d < D, other=0.0),)  # [BD]
            pools += (tl.zeros([BD], tl.float32),)
            gradients += (tl.zeros([BD], tl.float32),)

    hidden += offset_of(cu_seqlens, b, first, stride_hb * UNIT, stride_hs * UNIT)
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    start = number * CHUNK
    end = tl.minimum(start + CHUNK, length)
    low, high, words = attended_bits(mask, stride_ms, start, end, CHUNK, BS)
    for i in tl.range(low, high, BS, num_stages=STAGES):
        o_s = i + tl.arange(0, BS)
        m_s = block_of(words, i - start, o_s, high, CHUNK, BS)
        rows = ()
        for d in tl.static_range(ND):
            o_d = d * BD + o_b
            o_x = o_s.to(tl.int64)[:, None] * (stride_hs * UNIT) + o_d.to(tl.int64)[None, :] * stride_hd
            m_x = m_s[:, None] & (o_d < D)[None, :]
            b_h = tl.load(hidden + o_x, mask=m_x, other=0.0, eviction_policy="evict_first")
            rows += (b_h.to(tl.float32),)  # [BS, BD]
        new_states, new_pools, new_gradients = (), (), ()
        for h in tl.static_range(H):
            b_st = queries[h * ND][None, :] * rows[0]  # [BS, BD]
            for d in tl.static_range(1, ND):
                b_st += queries[h * ND + d][None, :] * rows[d]
            if direction is not None:
                b_tt = directions[h * ND][None, :] * rows[0]  # [BS, BD]
                for d in tl.static_range(1, ND):
                    b_tt += directions[h * ND + d][None, :] * rows[d]
                b_s, b_t = sum_both(b_st, b_tt)  # [BS]
            else:
                b_s = tl.sum(b_st, 1)  # [BS]
                b_t = b_s
            if scores is not None:
                tl.store(scores + h * total.to(tl.int64) + first + o_s, b_s, mask=m_s)
                tl.store(scores + (H + h) * total.to(tl.int64) + first + o_s, b_t, mask=m_s)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_p, b_w, b_a, b_d, state = weigh(b_s, b_t, states[h], direction is not None, 0)
            new_states += (state,)
            if pooled is not None:
                moved = states[h][0] < state[0]
                for d in tl.static_range(ND):
                    b_c, b_v = pools[h * ND + d], gradients[h * ND + d]
                    b_c, b_v = add_block(b_c, b_v, b_p, b_w, b_a, b_d, moved, rows[d], gradient is not None, BS)
                    new_pools += (b_c,)
                    new_gradients += (b_v,)
        states = new_states
        if pooled is not None:
            pools, gradients = new_pools, new_gradients

    part = part_of(cu_seqlens, b, number, first, chunks, CHUNK)
    for h in tl.static_range(H):
        for d in tl.static_range(ND):
            o_d = d * BD + o_b
            store_pool(
                pooled, gradient, value, lse, max_sum, part_pooled, part_gradient, part_value, part_max_sum,
                part, b, chunks, B, partials, h, True, o_d, o_d < D, d == 0,
                states[h], pools[h * ND + d], gradients[h * ND + d], H, D, 0,
            )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def scores_kernel(
    query, hidden, direction, cu_seqlens, mask,
    value, lse, max_sum, part_value, part_max_sum, scores,
    B, S, total, partials,
    stride_gb, stride_gh, stride_gd, stride_hb, stride_hs, stride_hd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program multiplies BS rows with BH queries and directions: to scores [forms, H, total] or a pool's scalars."""
    chunk = tl.program_id(0)
    b, number, first, length, chunks = locate(chunk, cu_seqlens, B, S, total, BS)
    if number >= chunks or b >= B:
        return
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < H
    o_s = number * BS + tl.arange(0, BS)
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    m_s = counted(mask, stride_ms, o_s, length)
    hidden += offset_of(cu_seqlens, b, first, stride_hb * UNIT, stride_hs * UNIT)
    width = tl.where(tl.max(m_s.to(tl.int32), 0) > 0, D, 0)  # nothing is read where no row counts
    b_s = tl.zeros([BH, BS], tl.float32)
    b_t = tl.zeros([BH, BS], tl.float32)
    for k in tl.range(0, width, BD, num_stages=STAGES):
        o_d = k + tl.arange(0, BD)
        m_d = o_d < D
        o_x = o_s.to(tl.int64)[:, None] * (stride_hs * UNIT) + o_d.to(tl.int64)[None, :] * stride_hd
        b_h = tl.load(hidden + o_x, mask=m_s[:, None] & m_d[None, :], other=0.0, eviction_policy="evict_first")
        m_u = m_h[:, None] & m_d[None, :]
        b_u = tl.load(query + (b.to(tl.int64) * H + o_h)[:, None] * D + o_d[None, :], mask=m_u, other=0.0)  # [BH, BD]
        b_s = product(b_u, tl.trans(b_h), b_s)
        if direction is not None:
            o_g = b.to(tl.int64) * stride_gb + o_h[:, None] * stride_gh + o_d[None, :] * stride_gd
            b_t = product(tl.load(direction + o_g, mask=m_u, other=0.0), tl.trans(b_h), b_t)
    if scores is not None:
        o_x = o_h.to(tl.int64)[:, None] * total + first + o_s[None, :]
        m_x = m_h[:, None] & m_s[None, :]
        tl.store(scores + o_x, b_s, mask=m_x)
        if direction is not None:
            tl.store(scores + total.to(tl.int64) * H + o_x, b_t, mask=m_x)
    else:
        b_s = tl.where(m_s[None, :], b_s, float("-inf"))
        _, _, _, _, state = weigh(b_s, b_t, no_rows([BH]), True, 1)
        store_pool(
            None, None, value, lse, max_sum, None, None, part_value, part_max_sum,
            part_of(cu_seqlens, b, number, first, chunks, BS), b, chunks, B, partials, o_h, m_h, None, None, True,
            state, None, None, H, D, 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(
    scores, hidden, cu_seqlens, mask,
    pooled, gradient, value, lse, max_sum,
    part_pooled, part_gradient, part_value, part_max_sum,
    B, S, total, partials,
    stride_hb, stride_hs, stride_hd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr,
    BH: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program sums BD columns of one chunk for BH queries whose scores are known."""
    chunk = tl.program_id(0)
    b, number, first, length, chunks = locate(chunk, cu_seqlens, B, S, total, CHUNK)
    if number >= chunks or b >= B:
        return
    o_h = tl.program_id(2) * BH + tl.arange(0, BH)
    m_h = o_h < H
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    hidden += offset_of(cu_seqlens, b, first, stride_hb * UNIT, stride_hs * UNIT)
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    state = no_rows([BH])
    b_c = tl.zeros([BH, BD], tl.float32)
    b_v = tl.zeros([BH, BD], tl.float32)
    start = number * CHUNK
    end = tl.minimum(start + CHUNK, length)
    low, high = attended(mask, stride_ms, start, end, CHUNK, BS)
    for i in tl.range(low, high, BS, num_stages=STAGES):
        o_s = i + tl.arange(0, BS)
        m_s = counted(mask, stride_ms, o_s, high)
        o_x = o_s.to(tl.int64)[:, None] * (stride_hs * UNIT) + o_d.to(tl.int64)[None, :] * stride_hd
        b_h = tl.load(hidden + o_x, mask=m_s[:, None] & m_d[None, :], other=0.0, eviction_policy="evict_first")
        o_x = o_h.to(tl.int64)[:, None] * total + first + o_s[None, :]
        m_x = m_h[:, None] & m_s[None, :]
        b_s = tl.load(scores + o_x, mask=m_x, other=float("-inf"))  # [BH, BS]
        b_t = b_s
        if gradient is not None:
            b_t = tl.load(scores + total.to(tl.int64) * H + o_x, mask=m_x, other=0.0)  # [BH, BS]
        b_p, b_w, b_a, b_d, state = weigh(b_s, b_t, state, gradient is not None, 1)
        if gradient is not None:
            b_v = product(b_w, b_h, (b_v - b_d[:, None] * b_c) * b_a[:, None])  # [BH, BD]
        b_c = product(b_p, b_h, b_c * b_a[:, None])  # [BH, BD]
    store_pool(
        pooled, gradient, value, lse, max_sum, part_pooled, part_gradient, part_value, part_max_sum,
        part_of(cu_seqlens, b, number, first, chunks, CHUNK), b, chunks, B, partials,
        o_h, m_h, o_d[None, :], m_h[:, None] & m_d[None, :], tl.program_id(1) == 0,
        state, b_c, b_v, H, D, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def merge_kernel(
    part_pooled, part_gradient, part_value, part_max_sum,
    pooled, gradient, value, lse, max_sum, cu_seqlens,
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
    part = part_of(cu_seqlens, b, 0, first, chunks, CHUNK) * H + h  # and H further for every next chunk
    count = partials.to(tl.int64) * H
    o_c = tl.arange(0, BC)

    b_top = tl.full([BC], float("-inf"), tl.float32)
    b_at = tl.zeros([BC], tl.int32)
    for i in range(0, chunks, BC):
        o_x = part + (i + o_c).to(tl.int64) * H
        b_m = tl.load(part_max_sum + o_x, mask=i + o_c < chunks, other=float("-inf"))  # [BC]
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
        b_m = tl.load(part_max_sum + o_x, mask=m_c, other=float("-inf"))  # [BC]
        b_share = tl.load(part_max_sum + count + o_x, mask=m_c, other=0.0) * tl.exp2((b_m - b_safe) * LOG2E)  # [BC]
        b_l += b_share
        if value is not None:
            b_x += b_share * (tl.load(part_value + o_x, mask=m_c, other=0.0) - b_r)
    b_l_all = tl.sum(b_l, 0)
    b_l_safe = tl.where(b_l_all == 0, 1.0, b_l_all)
    b_t = b_r + tl.sum(b_x, 0) / b_l_safe
    result = b.to(tl.int64) * H + h
    if tl.program_id(1) == 0:
        store_scalars(max_sum, value, lse, result, B * H, b_m_all, b_l_all, b_t, True, True)

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
            b_m = tl.load(part_max_sum + o_x, mask=m_c, other=float("-inf"))
            b_share = tl.load(part_max_sum + count + o_x, mask=m_c, other=0.0) * tl.exp2((b_m - b_safe) * LOG2E)
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
def outer_kernel(
    scores, query, direction, max_sum, value, grad_lse, cu_seqlens, mask, grad_hidden,
    B, S, total,
    stride_gb, stride_gh, stride_gd, stride_mb, stride_ms,
    H: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The gradient of hidden: the sum over queries of p_j (t_j - t + dlse) u + p_j dc, 0 in rows that do not count."""
    block = tl.program_id(0)
    if cu_seqlens is not None:
        block -= 1  # rows before the first sequence
    b, number, first, length, blocks = locate(block, cu_seqlens, B, S, total, BS)
    if number >= blocks:
        return
    o_s = number * BS + tl.arange(0, BS)
    m_s = o_s < length
    if mask is not None:
        mask += b.to(tl.int64) * stride_mb
    m_a = counted(mask, stride_ms, o_s, tl.where(b < B, length, 0))
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_u = o_d < tl.where(b < B, D, 0)
    b_dh = tl.zeros([BS, BD], tl.float32)
    for h in range(H):
        o_x = b.to(tl.int64) * H + h
        b_m = tl.load(max_sum + o_x, mask=b < B, other=0.0)
        b_l = tl.load(max_sum + B * H + o_x, mask=b < B, other=1.0)
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
