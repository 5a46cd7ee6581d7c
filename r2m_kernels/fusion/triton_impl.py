"""Time-weighted fusion and the linear head in Triton, in float32. The kernels read `weight`, 0-dim, on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r2m_kernels.triton_target import OPTIONS, on_device_of_arguments

# Columns of a row: 8 a thread, one 128-bit load where they are 16-bit.
COLUMNS = 1024
# A tile whose rows are summed, of as many elements: 64 columns are a full cache line where they are 16-bit.
SUM_ROWS, SUM_COLUMNS = 16, 64
WARPS = 4


@triton.jit
def time_weighted_fusion_kernel(
    aggregated, rte, weight, fused, stride_ab, stride_ad, stride_hb, stride_hd, D, BD: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    m_d = o_d < D  # [BD]
    w = tl.load(weight)
    b_a = tl.load(aggregated + i_b * stride_ab + o_d * stride_ad, mask=m_d).to(tl.float32)  # [BD]
    b_h = tl.load(rte + i_b * stride_hb + o_d * stride_hd, mask=m_d).to(tl.float32)  # [BD]
    tl.store(fused + i_b * D + o_d, (1 - w) * b_a + w * b_h, mask=m_d)


@on_device_of_arguments
def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: Tensor) -> Tensor:
    """As torch_impl.time_weighted_fusion, in one launch."""
    fused = rte.new_empty(rte.shape, dtype=torch.promote_types(aggregated.dtype, rte.dtype))
    if rte.numel():
        time_weighted_fusion_kernel[_tiles(rte, 1, COLUMNS)](
            aggregated,
            rte,
            weight,
            fused,
            *aggregated.stride(),
            *rte.stride(),
            rte.shape[1],
            BD=COLUMNS,
            num_warps=WARPS,
            **OPTIONS,
        )
    return fused


@triton.jit
def time_weighted_fusion_backward_kernel(
    grad, weight, grad_aggregated, grad_rte, stride_gb, stride_gd, D, BD: tl.constexpr
):
    i_b = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    m_d = o_d < D  # [BD]
    w = tl.load(weight)
    b_grad = tl.load(grad + i_b * stride_gb + o_d * stride_gd, mask=m_d).to(tl.float32)  # [BD]
    if grad_aggregated is not None:
        tl.store(grad_aggregated + i_b * D + o_d, (1 - w) * b_grad, mask=m_d)
    if grad_rte is not None:
        tl.store(grad_rte + i_b * D + o_d, w * b_grad, mask=m_d)


@on_device_of_arguments
def time_weighted_fusion_backward(
    grad: Tensor, weight: Tensor, aggregated_dtype: torch.dtype | None, rte_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """As torch_impl.time_weighted_fusion_backward, in one launch."""
    grad_aggregated = None if aggregated_dtype is None else grad.new_empty(grad.shape, dtype=aggregated_dtype)
    grad_rte = None if rte_dtype is None else grad.new_empty(grad.shape, dtype=rte_dtype)
    if grad.numel():
        time_weighted_fusion_backward_kernel[_tiles(grad, 1, COLUMNS)](
            grad,
            weight,
            grad_aggregated,
            grad_rte,
            *grad.stride(),
            grad.shape[1],
            BD=COLUMNS,
            num_warps=WARPS,
            **OPTIONS,
        )
    return grad_aggregated, grad_rte


@triton.jit
def fused_reward_kernel(
    aggregated,
    rte,
    weight,
    head_weight,
    head_bias,
    reward,
    stride_ab,
    stride_ad,
    stride_hb,
    stride_hd,
    stride_pd,
    D,
    BD: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    b_dot_a = tl.zeros([BD], tl.float32)  # [BD]
    b_dot_h = tl.zeros([BD], tl.float32)  # [BD]
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD).to(tl.int64)  # [BD]
        m_d = o_d < D  # [BD]
        b_phi = tl.load(head_weight + o_d * stride_pd, mask=m_d, other=0).to(tl.float32)  # [BD]
        b_a = tl.load(aggregated + i_b * stride_ab + o_d * stride_ad, mask=m_d, other=0).to(tl.float32)  # [BD]
        b_h = tl.load(rte + i_b * stride_hb + o_d * stride_hd, mask=m_d, other=0).to(tl.float32)  # [BD]
        b_dot_a += b_phi * b_a
        b_dot_h += b_phi * b_h
    w = tl.load(weight)
    # Combined at the end, so that at w = 1 the bits are those of phi . H, whatever A is.
    b_reward = (1 - w) * tl.sum(b_dot_a, 0) + w * tl.sum(b_dot_h, 0)
    if head_bias is not None:
        b_reward += tl.load(head_bias).to(tl.float32)
    tl.store(reward + i_b, b_reward)


@on_device_of_arguments
def fused_reward(
    aggregated: Tensor, rte: Tensor, weight: Tensor, head_weight: Tensor, head_bias: Tensor | None
) -> Tensor:
    """As torch_impl.fused_reward, in one launch: a program a sequence."""
    batch, d = rte.shape
    reward = rte.new_empty(batch, dtype=torch.float32)
    if batch:
        fused_reward_kernel[(batch,)](
            aggregated,
            rte,
            weight,
            head_weight,
            head_bias,
            reward,
            *aggregated.stride(),
            *rte.stride(),
            *head_weight.stride(),
            d,
            BD=COLUMNS,
            num_warps=WARPS,
            **OPTIONS,
        )
    return reward


@triton.jit(do_not_specialize=["B"])
def fused_reward_backward_kernel(
    grad,
    aggregated,
    rte,
    weight,
    head_weight,
    grad_aggregated,
    grad_rte,
    partial_sums,
    partial_bias,
    stride_gb,
    stride_ab,
    stride_ad,
    stride_hb,
    stride_hd,
    stride_pd,
    B,
    D,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    o_b = i_b * BB + tl.arange(0, BB)[:, None]  # [BB, 1]
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    m_b, m_d = o_b < B, o_d < D  # [BB, 1], [BD]
    m_bd = m_b & m_d  # [BB, BD]
    w = tl.load(weight)
    b_grad = tl.load(grad + o_b * stride_gb, mask=m_b, other=0)  # [BB, 1]
    b_phi = tl.load(head_weight + o_d * stride_pd, mask=m_d).to(tl.float32)  # [BD]
    b_a = tl.load(aggregated + o_b * stride_ab + o_d * stride_ad, mask=m_bd, other=0).to(tl.float32)  # [BB, BD]
    b_h = tl.load(rte + o_b * stride_hb + o_d * stride_hd, mask=m_bd, other=0).to(tl.float32)  # [BB, BD]
    b_fused = (1 - w) * b_a + w * b_h  # [BB, BD]
    tl.store(partial_sums + i_b * D + o_d, tl.sum(b_grad * b_fused, 0), mask=m_d)
    if partial_bias is not None:
        tl.store(partial_bias + i_b + o_d, tl.sum(b_grad), mask=o_d == 0)  # by the program of column 0
    if grad_aggregated is not None:
        tl.store(grad_aggregated + o_b * D + o_d, (1 - w) * (b_grad * b_phi), mask=m_bd)
    if grad_rte is not None:
        tl.store(grad_rte + o_b * D + o_d, w * (b_grad * b_phi), mask=m_bd)


@triton.jit(do_not_specialize=["blocks"])
def head_gradient_kernel(
    partial_sums, partial_bias, grad_head_weight, grad_head_bias, blocks, D, BB: tl.constexpr, BD: tl.constexpr
):
    o_d = tl.program_id(0).to(tl.int64) * BD + tl.arange(0, BD)  # [BD]
    m_d = o_d < D  # [BD]
    b_sum = tl.zeros([BB, BD], tl.float32)  # [BB, BD]
    b_bias = tl.zeros([BB, 1], tl.float32)  # [BB, 1]
    for start in range(0, blocks, BB):
        o_b = start + tl.arange(0, BB).to(tl.int64)[:, None]  # [BB, 1]
        m_b = o_b < blocks  # [BB, 1]
        b_sum += tl.load(partial_sums + o_b * D + o_d, mask=m_b & m_d, other=0)
        if partial_bias is not None:
            b_bias += tl.load(partial_bias + o_b, mask=m_b, other=0)
    tl.store(grad_head_weight + o_d, tl.sum(b_sum, 0), mask=m_d)
    if grad_head_bias is not None:
        tl.store(grad_head_bias + o_d, tl.sum(b_bias), mask=o_d == 0)  # by the program of column 0


@on_device_of_arguments
def fused_reward_backward(
    grad: Tensor,
    aggregated: Tensor,
    rte: Tensor,
    weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    needs_aggregated: bool,
    needs_rte: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """As torch_impl.fused_reward_backward, in two launches: sums over blocks of rows, then over blocks, in order."""
    batch, d = rte.shape
    tiles = _tiles(rte, SUM_ROWS, SUM_COLUMNS)
    grad_aggregated = aggregated.new_empty(aggregated.shape) if needs_aggregated else None
    grad_rte = rte.new_empty(rte.shape) if needs_rte else None
    grad_head_weight = head_weight.new_empty(d)
    grad_head_bias = None if head_bias is None else head_bias.new_empty(())
    partial_sums = grad.new_empty(tiles[0], d)
    partial_bias = None if head_bias is None else grad.new_empty(tiles[0])
    if batch:
        fused_reward_backward_kernel[tiles](
            grad,
            aggregated,
            rte,
            weight,
            head_weight,
            grad_aggregated,
            grad_rte,
            partial_sums,
            partial_bias,
            *grad.stride(),
            *aggregated.stride(),
            *rte.stride(),
            *head_weight.stride(),
            batch,
            d,
            BB=SUM_ROWS,
            BD=SUM_COLUMNS,
            num_warps=WARPS,
            **OPTIONS,
        )
    head_gradient_kernel[tiles[1:]](
        partial_sums,
        partial_bias,
        grad_head_weight,
        grad_head_bias,
        tiles[0],
        d,
        BB=SUM_ROWS,
        BD=SUM_COLUMNS,
        num_warps=WARPS,
        **OPTIONS,
    )
    return grad_aggregated, grad_rte, grad_head_weight, grad_head_bias


def _tiles(matrix: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """The grid of tiles of so many rows and columns."""
    return triton.cdiv(matrix.shape[0], rows), triton.cdiv(matrix.shape[1], columns)
