"""What the Triton kernels of attention pooling share: where rows are, the online softmax, where its results go.

Pointers are plain (`query`), offsets o_, masks m_, values in registers b_ with their shape beside.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = 2 ** (x LOG2E), and the GPU has an instruction for powers of two
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def locate(chunk, cu_seqlens, B, S, total, CHUNK: tl.constexpr):
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
def part_of(cu_seqlens, b, number, first, chunks, CHUNK: tl.constexpr):
    """The workspace's row for a chunk of a sequence of at least two."""
    if cu_seqlens is None:
        return b.to(tl.int64) * chunks + number
    else:
        return 2 * first // CHUNK + number


@triton.jit
def offset_of(cu_seqlens, b, first, stride_hb, stride_hs):
    """Where a sequence's rows begin in hidden."""
    if cu_seqlens is None:
        return b.to(tl.int64) * stride_hb
    else:
        return first * stride_hs


@triton.jit
def counted(mask, stride_ms, o_s, end):
    """Which of the rows o_s of a sequence come before `end` and are not masked."""
    m_s = o_s < end
    if mask is not None:
        m_s = m_s & (tl.load(mask + o_s.to(tl.int64) * stride_ms, mask=m_s, other=0) != 0)
    return m_s


@triton.jit
def attended(mask, stride_ms, start, end, CHUNK: tl.constexpr, BS: tl.constexpr):
    """The rows from start to end that a mask leaves at both ends; the first is that of a block."""
    if mask is None:
        return start, end
    else:
        o_s = start + tl.arange(0, CHUNK)
        m_s = counted(mask, stride_ms, o_s, end)  # [CHUNK]
        low = tl.min(tl.where(m_s, o_s, end), 0)
        return start + (low - start) // BS * BS, tl.max(tl.where(m_s, o_s + 1, start), 0)


@triton.jit
def attended_bits(mask, stride_ms, start, end, CHUNK: tl.constexpr, BS: tl.constexpr):
    """As attended, and a bit for each row that counts: no block then waits for its part of the mask."""
    if mask is None:
        return start, end, ()
    else:
        WORD: tl.constexpr = min(CHUNK, 64)
        low, high = end, start
        words = ()
        for k in tl.static_range(CHUNK // WORD):
            o_w = tl.arange(0, WORD)
            o_s = start + k * WORD + o_w
            m_s = counted(mask, stride_ms, o_s, end)  # [WORD]
            low = tl.minimum(low, tl.min(tl.where(m_s, o_s, end), 0))
            high = tl.maximum(high, tl.max(tl.where(m_s, o_s + 1, start), 0))
            words += (tl.sum(m_s.to(tl.int64) << o_w.to(tl.int64), 0),)
        return start + (low - start) // BS * BS, high, words


@triton.jit
def block_of(words, offset, o_s, high, CHUNK: tl.constexpr, BS: tl.constexpr):
    """Which of the rows o_s, a block that begins `offset` rows into its chunk, count."""
    if len(words) == 0:
        return o_s < high
    else:
        WORD: tl.constexpr = min(CHUNK, 64)
        word = words[0]
        for k in tl.static_range(1, CHUNK // WORD):
            word = tl.where(offset >= k * WORD, words[k], word)
        bits = (word >> (offset % WORD).to(tl.int64)).to(tl.int32)
        return ((bits >> tl.arange(0, BS)) & 1) != 0


@triton.jit
def _add_both(b_x, b_y, b_v, b_w):
    return b_x + b_v, b_y + b_w


@triton.jit
def sum_both(b_x, b_y):
    """The sums of two [BS, BD] over columns, with one exchange among warps in place of two."""
    if INTERPRETED:  # it would take such a reduction number by number
        return tl.sum(b_x, 1), tl.sum(b_y, 1)
    else:
        return tl.reduce((b_x, b_y), 1, _add_both)


@triton.jit
def add_block(b_c, b_v, b_p, b_w, b_a, b_d, moved, b_h, GRADIENT: tl.constexpr, BS: tl.constexpr):
    """C and V [BD] with a block of rows h [BS, BD] more, weighed by `weigh`."""
    if moved:  # rare: in other blocks a is 1 and d is 0
        b_v = (b_v - b_d * b_c) * b_a
        b_c = b_c * b_a
    if INTERPRETED:  # where rows one after another take ten times as long; tests call add_rows by itself
        b_c += tl.sum(b_p[:, None] * b_h, 0)
        if GRADIENT:
            b_v += tl.sum(b_w[:, None] * b_h, 0)
    else:
        b_c = add_rows(b_c, b_p, b_h, BS)
        if GRADIENT:
            b_v = add_rows(b_v, b_w, b_h, BS)
    return b_c, b_v


@triton.jit
def add_rows(b_x, b_w, b_h, BS: tl.constexpr):
    """b_x [BD] plus the sum of w h over rows: one after another, so that each is one instruction."""
    if BS == 1:
        return b_x + tl.sum(b_w[:, None] * b_h, 0)
    elif BS == 2:
        b_0, b_1 = tl.split(tl.trans(b_h))  # [BD]
        b_w0, b_w1 = tl.split(b_w)
        return (b_x + b_w0 * b_0) + b_w1 * b_1
    else:
        b_h0, b_h1 = tl.split(tl.permute(tl.reshape(b_h, [2, BS // 2, b_h.shape[1]]), 1, 2, 0))
        b_w0, b_w1 = tl.split(tl.trans(tl.reshape(b_w, [2, BS // 2])))
        return add_rows(add_rows(b_x, b_w0, b_h0, BS // 2), b_w1, b_h1, BS // 2)


@triton.jit
def along(b_x, AXIS: tl.constexpr):
    """A value per query beside values per query and row: [] with [BS] (AXIS 0), or [BH] with [BH, BS] (AXIS 1)."""
    if AXIS == 0:
        return b_x
    else:
        return b_x[:, None]


@triton.jit
def no_rows(shape: tl.constexpr):
    """The state of an online softmax before its first block."""
    b_0 = tl.zeros(shape, tl.float32)
    return tl.full(shape, float("-inf"), tl.float32), b_0, b_0, b_0


@triton.jit
def weigh(b_s, b_t, state, DIRECTION: tl.constexpr, AXIS: tl.constexpr):
    """A block of rows in the online softmax: scores s (-inf: no such row) and, with DIRECTION, t = direction . hidden.

    state: m, the largest score; l = sum p with p = exp(s - m); the mean of t under p, as a centre r and what it lacks,
    e = sum p (t - r). Returns the block's p, w = p (t - r), the factor a that brings earlier sums to the new m, by how
    much r moved as d, and the state. So with C = sum p hidden before the block, V = (V - d C) a + sum w hidden is
    sum p (t - r) hidden again.

    r is the mean up to the last block with a new largest score, that block included; in other blocks a is 1 and d is 0.
    Centred so, what all rows have in common cancels no digits, and a row that outweighs all others is the mean.
    """
    b_m, b_l, b_r, b_e = state
    b_top = tl.max(b_s, AXIS)
    b_new = tl.maximum(b_m, b_top)
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # before the first row: exp(-inf - 0) = 0
    b_a = tl.exp2((b_m - b_safe) * LOG2E)
    b_p = tl.exp2((b_s - along(b_safe, AXIS)) * LOG2E)
    b_w, b_d = b_p, b_a
    b_l *= b_a
    b_sum = b_l + tl.sum(b_p, AXIS)
    if DIRECTION:
        b_near = tl.max(tl.where(b_s == along(b_top, AXIS), b_t, float("-inf")), AXIS)
        b_e *= b_a
        b_total = b_e + b_l * (b_r - b_near) + tl.sum(b_p * (b_t - along(b_near, AXIS)), AXIS)
        b_mean = tl.where(b_top > b_m, b_near + b_total / tl.where(b_sum == 0, 1.0, b_sum), b_r)
        b_w = b_p * (b_t - along(b_mean, AXIS))
        b_d = tl.where(b_l == 0, 0.0, b_mean - b_r)
        b_e += tl.sum(b_w, AXIS) - b_d * b_l
        b_r = b_mean
    return b_p, b_w, b_a, b_d, (b_new, b_sum, b_r, b_e)


@triton.jit
def store_scalars(max_sum, value, lse, o_x, count, b_m, b_l, b_value, m_x, LSE: tl.constexpr):
    """m and l to max_sum [2, count], and what else is asked for."""
    tl.store(max_sum + o_x, b_m, mask=m_x)
    tl.store(max_sum + count + o_x, b_l, mask=m_x)
    if value is not None:
        tl.store(value + o_x, b_value, mask=m_x)
    if LSE:
        b_lse = b_m + tl.log(tl.where(b_l == 0, 1.0, b_l))  # m is -inf where there is no row
        tl.store(lse + o_x, b_lse, mask=m_x)


@triton.jit
def store_pool(
    pooled, gradient, value, lse, max_sum,
    part_pooled, part_gradient, part_value, part_max_sum,
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
            store_scalars(max_sum, value, lse, o_result, B * H, b_m, b_l, b_value, m_h, True)
        else:
            store_scalars(part_max_sum, part_value, lse, o_partial, partials * H, b_m, b_l, b_value, m_h, False)
    if pooled is not None:
        o_result = along(o_result, AXIS) * D + o_d
        o_partial = along(o_partial, AXIS) * D + o_d
        b_c /= along(b_safe, AXIS)
        if chunks == 1:
            tl.store(pooled + o_result, b_c, mask=m_d)
        else:
            tl.store(part_pooled + o_partial, b_c, mask=m_d)
        if gradient is not None:
            b_v = b_v / along(b_safe, AXIS) - along(b_e / b_safe, AXIS) * b_c
            if chunks == 1:
                tl.store(gradient + o_result, b_v, mask=m_d)
            else:
                tl.store(part_gradient + o_partial, b_v, mask=m_d)


@triton.jit
def product(b_x, b_h, b_sum):
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
