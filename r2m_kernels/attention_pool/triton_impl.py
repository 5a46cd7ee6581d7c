"""Attention pooling in Triton: the launchers. Every sequence is cut into chunks of rows; a chunk's pool is a partial
result, and the partial results of a sequence are merged in a fixed order.

Launches: a pool takes one kernel over chunks and one that merges, which is left out where no sequence can have two
chunks: one read of `hidden`, and a workspace of at most 1/16 of its bytes. Where the queries of a sequence do not fit
into registers together (more than 4, or wide rows; D > 8192), the first of these is a matrix product. If more than
scalars is asked for, it keeps scores, float32 [1 or 2, H, rows], and a further kernel reads `hidden` a second time for
the sums. The backward adds two small elementwise launches and, for the gradient of `hidden`, one that only writes it.
A scoring micro-batch is so 2 launches, and so is one of training.

Arguments and results as in torch_impl; float64 is not supported.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from r2m_kernels.attention_pool import triton_tuning
from r2m_kernels.attention_pool.triton_config import MERGE, OUTER, Config, rows_config, scores_config, sums_config
from r2m_kernels.attention_pool.triton_kernels import (
    merge_kernel,
    outer_kernel,
    rows_kernel,
    scores_kernel,
    sums_kernel,
)
from r2m_kernels.triton_target import OPTIONS, architecture, on_device_of_arguments


@on_device_of_arguments
def pool(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    vectors: bool = True,
    keep: bool = False,
) -> tuple[Any, ...]:
    """As torch_impl.pool. Kept are scores [2, H, rows], max_sum [2, B, H] (m and l, see weigh) and value."""
    B, *heads, D = query.shape
    H = heads[0] if heads else 1
    query = query.contiguous()
    new = query.new_empty
    pooled = new(B, *heads, D) if vectors else None
    gradient = new(B, *heads, D) if vectors and direction is not None else None
    value = new(B, *heads) if direction is not None else None
    lse, max_sum = new(B, *heads), new(2, B, H)
    case = H, D, hidden.dtype, vectors, direction is not None, architecture()
    rows = rows_config(*case)
    with_scores = keep or (vectors and rows is None)
    scores = new(1 if direction is None else 2, H, _rows(hidden)[1]) if with_scores else None
    results = pooled, gradient, value, lse, max_sum
    if query.numel():
        launch = functools.partial(_launch, query, hidden, direction, cu_seqlens, mask, results, scores)
        if rows is not None and triton_tuning.enabled():
            rows = triton_tuning.tuned(case, rows, launch)
        launch(rows)
    return pooled, gradient, value, lse, (scores, max_sum, value)


@on_device_of_arguments
def grad_hidden(
    query: Tensor,
    hidden: Tensor,
    direction: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    grad_lse: Tensor,
    kept: tuple[Tensor, ...],
) -> Tensor:
    """As torch_impl.grad_hidden."""
    scores, max_sum, value = kept
    result = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    (_, B, H), D = max_sum.shape, query.shape[-1]
    if hidden.numel():
        blocks = _chunks(hidden, cu_seqlens, B, OUTER["BS"])
        blocks += 0 if cu_seqlens is None else 2  # rows before the first sequence, and behind the last one
        outer_kernel[blocks, triton.cdiv(D, OUTER["BD"])](
            scores, query.contiguous(), direction, max_sum, value, grad_lse, cu_seqlens, mask, result,
            B, *_rows(hidden), *_strides_by_head(direction), *_strides(mask), H=H, D=D, **OUTER, **OPTIONS,
        )  # fmt: skip
    return result


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
    """Fills pooled, gradient, value, lse, max_sum and scores: with whole rows a program if `rows` says how."""
    B, *heads, D = query.shape
    H = heads[0] if heads else 1
    S, total = _rows(hidden)
    pooled, gradient, value, lse, max_sum = results
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
    part_max_sum = query.new_empty(2, partials, H)
    sizes = B, S, total, partials
    strides_g = (0, 0, 0) if direction is None else _strides_by_head(direction)
    unit, *strides_h = _strides_of_hidden(hidden)
    strides = *strides_h, *_strides(mask)
    widths: Config = {"H": H, "D": D, "UNIT": unit}

    if rows is not None:
        rows_kernel[(chunks,)](
            query, hidden, direction, cu_seqlens, mask, *results,
            part_pooled, part_gradient, part_value, part_max_sum, scores, *sizes, *strides_g, *strides,
            **widths, **rows, **OPTIONS,
        )  # fmt: skip
    else:
        groups = triton.cdiv(H, by_heads["BH"])
        scores_kernel[_chunks(hidden, cu_seqlens, B, by_heads["BS"]), groups](
            query, hidden, direction, cu_seqlens, mask, value, lse, max_sum,
            part_value, part_max_sum, scores, *sizes, *strides_g, *strides,
            **widths, **by_heads, **OPTIONS,
        )  # fmt: skip
        if pooled is not None:
            sums_kernel[chunks, triton.cdiv(D, by_slices["BD"]), groups](
                scores, hidden, cu_seqlens, mask, *results,
                part_pooled, part_gradient, part_value, part_max_sum, *sizes, *strides,
                **widths, **by_slices, **OPTIONS,
            )  # fmt: skip
    if partials:
        merge_kernel[B * H, 1 if pooled is None else triton.cdiv(D, MERGE["BD"])](
            part_pooled, part_gradient, part_value, part_max_sum, *results, cu_seqlens,
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


def _strides_by_head(vectors: Tensor) -> tuple[int, ...]:
    """Of [B, H, D], also where it is [B, D]."""
    of_sequences, *of_heads, of_columns = vectors.stride()
    return of_sequences, of_heads[0] if of_heads else 0, of_columns


def _strides_of_hidden(hidden: Tensor) -> tuple[int, ...]:
    """Numbers of a unit, 16 bytes' or 1; strides of sequences and rows in units, of columns in numbers."""
    of_sequences, of_rows, of_columns = hidden.stride() if hidden.ndim == 3 else (0, *hidden.stride())
    unit = 16 // hidden.itemsize
    if of_sequences % unit or of_rows % unit:
        unit = 1
    return unit, of_sequences // unit, of_rows // unit, of_columns


def _strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else mask.stride()
