"""Attention pooling in PyTorch: tiles of hidden states are read once, used while in cache, and their pools merged.

Every function takes query, and direction in its shape, [B, H, D] or, of one query, [B, D]; results lack H then, too.
They are float32 or float64, with the softmax scale in query: this is the dtype of all arithmetic and results. hidden is
[B, S, D] with an optional mask, or [total, D] with cu_seqlens.
"""

from typing import Any

import torch
from torch import Tensor

from r2m_kernels.attention_pool.merge import Segments, merge, merge_with_gradient, total
from r2m_kernels.registration import full_precision

# Rows of one packed partial pool: few enough that a sequence's last chunk wastes little work, enough that partial
# pools stay far smaller than the hidden states.
CHUNK = 64
# Elements of hidden states in arithmetic precision at a time. CPU: 2 MB in float32, so that a tile stays in cache
# between its two products. Elsewhere: 128 MB, so that launching costs little.
TILE_CPU, TILE = 1 << 19, 1 << 25

# Part of the work: the sequence of each of its G blocks of C rows, where these rows are (None: nowhere, one row of
# padding), and which of them count [G, C] (None: all).
Sequences = slice | Tensor
Tile = tuple[Sequences, tuple[slice | Tensor, ...] | None, Tensor | None]


@full_precision
def pool(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    vectors: bool = True,
    keep: bool = False,
) -> tuple[Any, ...]:
    """pooled, gradient = Cov_p(hidden) direction [B, H, D], value = direction . pooled and lse [B, H].

    None for what is not asked for: without direction gradient and value, without vectors pooled and gradient; with
    vectors value is optional. Last, with keep, what grad_hidden needs: here the products of every tile, two scalars a
    row, lse and value.
    """
    if query.ndim == 2:
        by_head = None if direction is None else direction[:, None]
        *alone, kept = pool(query[:, None], hidden, by_head, cu_seqlens, mask, vectors, keep)
        return *(None if result is None else result.squeeze(1) for result in alone), kept
    products: list[tuple[Tensor, Tensor]] = []
    results: list[tuple[Tensor, ...]] = []
    both = query if direction is None else torch.cat([query, direction], 1)
    tiles, segments = _tiles(query, hidden, cu_seqlens, mask)
    for sequence, rows, valid in tiles:
        block = _load(hidden, rows, valid, query.dtype)
        scores = both[sequence] @ block.mT
        if direction is None:
            p, lse = _softmax(scores, valid)
            results.append((p @ block, lse))
            continue
        scores, values = scores.chunk(2, 1)
        if keep:
            products.append((scores, values))
        p, lse = _softmax(scores, valid)
        values = _masked(values, valid, 0)
        if not vectors:
            results.append(((p * values).sum(-1, keepdim=True), lse))
            continue
        centred = p * (values - (p * values).sum(-1, keepdim=True))
        pooled, gradient = (torch.cat([p, centred], 1) @ block).chunk(2, 1)
        # `centred` sums to 0 only up to rounding, which a common offset of all rows would blow up.
        results.append((pooled, gradient - centred.sum(-1, keepdim=True) * pooled, lse))

    parts = _joined(results, query, segments)
    if direction is None:
        pooled, lse = merge(parts[0], parts[1], segments)
        return pooled, None, None, lse, None
    if not vectors:
        value, lse = merge(parts[0], parts[1], segments)
        return None, None, value.squeeze(-1), lse, None
    pooled, gradient, lse = merge_with_gradient(parts[0], parts[1], parts[2], direction, 1.0, segments)
    if not keep:
        return pooled, gradient, None, lse, None
    value = (direction * pooled).sum(-1)
    return pooled, gradient, value, lse, (products, lse, value)


@full_precision
def grad_hidden(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    grad_lse: Tensor,
    kept: tuple[Any, ...],
) -> Tensor:
    """sum over queries of p_j (t_j - value + dlse) query + p_j direction, with t = direction . hidden; contiguous, in
    the shape and dtype of hidden. `kept` is what pool kept for this direction."""
    if query.ndim == 2:
        return grad_hidden(query[:, None], hidden, direction[:, None], cu_seqlens, mask, grad_lse[:, None], kept)
    products, lse, value = kept
    lse = lse.masked_fill(lse == -torch.inf, 0)[..., None]
    value, grad_lse = value[..., None], grad_lse[..., None]
    tiles, segments = _tiles(query, hidden, cu_seqlens, mask)
    weights: list[tuple[Tensor, Tensor]] = []
    sums: list[tuple[Tensor, ...]] = []
    for (sequence, _, valid), (scores, values) in zip(tiles, products, strict=True):
        p = torch.exp(_masked(scores, valid, -torch.inf) - lse[sequence])
        dscores = p * (values - value[sequence])
        weights.append((p, dscores))
        sums.append((dscores.sum(-1, keepdim=True), p.sum(-1, keepdim=True)))
    # p sums to 1 and ds to 0 only up to rounding, which large logits or a common offset of all rows would blow up.
    remainder, mass = (total(part, segments) for part in _joined(sums, query, segments))
    mass = mass.masked_fill(mass == 0, 1)
    remainder = remainder / mass

    # Packed rows of no sequence have gradient zero; padding of a tile is written to one row past the end.
    past_the_end = 0 if cu_seqlens is None else 1
    result = hidden.new_zeros(hidden.shape[0] + past_the_end, *hidden.shape[1:])
    both = torch.cat([query, direction], 1) / torch.cat([mass, mass], 1)
    for (sequence, rows, valid), (p, dscores) in zip(tiles, weights, strict=True):
        if rows is not None:
            factors = torch.cat([dscores + p * (grad_lse - remainder)[sequence], p], 1)  # [G, 2 H, C]
            block = factors.mT @ both[sequence]
            block = block if valid is None or cu_seqlens is not None else _zeroed(block, valid)
            result[rows] = block.to(hidden.dtype)
    return result[: hidden.shape[0]]


def _softmax(scores: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the rows of a tile [G, H, C] (0 where none counts) and the log-sum-exp [G, H]."""
    scores = _masked(scores, valid, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    p = torch.exp(scores - top)
    mass = p.sum(-1, keepdim=True)
    return p / mass.masked_fill(mass == 0, 1), (top + torch.log(mass)).squeeze(-1)


def _masked(scores: Tensor, valid: Tensor | None, value: float) -> Tensor:
    """Scores [G, H, C], with `value` where a row does not count."""
    return scores if valid is None else scores.masked_fill(~valid[:, None], value)


def _joined(results: list[tuple[Tensor, ...]], query: Tensor, segments: Segments) -> list[Tensor]:
    """What every tile gave, joined: [parts, B, ...] for dense hidden, [parts, ...] for packed."""
    columns = [torch.cat(column) for column in zip(*results, strict=True)]
    # Without rows there is one tile, and with no sequences -1 would not say how many parts there are.
    batch, parts = query.shape[0], -1 if query.shape[0] else 1
    return columns if segments else [column.unflatten(0, (parts, batch)) for column in columns]


def _tiles(
    query: Tensor, hidden: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None
) -> tuple[list[Tile], Segments]:
    """The tiles of the work, and which sequence each block of a packed one belongs to."""
    batch, width = query.shape[0], query.shape[-1]
    size = TILE_CPU if hidden.device.type == "cpu" else TILE
    if 0 in (batch, hidden.shape[0], hidden.shape[-2]):
        return [(slice(None), None, query.new_zeros(batch, 1, dtype=torch.bool))], None
    if cu_seqlens is None:
        return _dense_tiles(hidden, mask, size), None
    sequence, start, offsets = _chunks(cu_seqlens, hidden.shape[0])
    return _packed_tiles(hidden, sequence, start, cu_seqlens[1:], max(1, size // (CHUNK * width))), (sequence, offsets)


def _dense_tiles(hidden: Tensor, mask: Tensor | None, size: int) -> list[Tile]:
    """As many rows of one sequence as fit, then as many sequences: slices, whatever the strides."""
    batch, length, width = hidden.shape
    rows = min(length, max(1, size // width))
    sequences = max(1, size // (width * rows))
    places = [
        (slice(b, b + sequences), slice(r, r + rows))
        for r in range(0, length, rows)
        for b in range(0, batch, sequences)
    ]
    return [(place[0], place, None if mask is None else mask[place]) for place in places]


def _chunks(cu_seqlens: Tensor, total_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The work list of packed sequences: every chunk's sequence and first row, every sequence's range of chunks.

    Sequence b owns the chunks from (cu_seqlens[b] - cu_seqlens[0]) // CHUNK + b: always enough of them (some stay
    empty), and their number follows from shapes alone, so the host never waits for the lengths.
    """
    batch = cu_seqlens.shape[0] - 1
    cu_seqlens = cu_seqlens.long()
    offsets = (cu_seqlens - cu_seqlens[0]) // CHUNK + torch.arange(batch + 1, device=cu_seqlens.device)
    chunk = torch.arange(total_rows // CHUNK + batch, device=cu_seqlens.device)
    # Chunks past the last sequence's range become empty ones that no sequence owns.
    sequence = (torch.searchsorted(offsets, chunk, right=True) - 1).clamp(max=batch - 1)
    return sequence, cu_seqlens[sequence] + (chunk - offsets[sequence]) * CHUNK, offsets


def _packed_tiles(hidden: Tensor, sequence: Tensor, start: Tensor, end: Tensor, chunks: int) -> list[Tile]:
    """`chunks` chunks each, as row numbers: one past the end of hidden where a chunk is longer than what remains."""
    tiles: list[Tile] = []
    within = torch.arange(CHUNK, device=hidden.device)
    for owner, first in zip(sequence.split(chunks), start.split(chunks), strict=True):
        rows = first[:, None] + within  # [G, C]
        valid = rows < end[owner, None]
        tiles.append((owner, (rows.where(valid, hidden.shape[0]),), valid))
    return tiles


def _load(hidden: Tensor, rows: tuple[slice | Tensor, ...] | None, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows [G, C, D] of a tile in the arithmetic dtype, 0 where they do not count."""
    if valid is None:
        return hidden[rows].to(dtype)
    if rows is None:
        return hidden.new_zeros(*valid.shape, hidden.shape[-1], dtype=dtype)
    if isinstance(rows[0], Tensor):
        at = rows[0].clamp(max=hidden.shape[0] - 1)
        block = hidden.index_select(0, at.flatten()).view(*at.shape, -1)
    else:
        block = hidden[rows]
    return _zeroed(block, valid).to(dtype)


def _zeroed(block: Tensor, valid: Tensor) -> Tensor:
    """Rows [G, C, D], 0 where they do not count: a weight of 0 does not stop NaN.

    Bitwise, because that is vectorised where masked_fill with a mask per row is not: 10 times faster on a CPU.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[block.itemsize]
    return (block.view(integer) & -valid[..., None].to(integer)).view(block.dtype)
