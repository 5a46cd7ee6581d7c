"""GREBT and its closed-form gradient in Triton: one kernel, all of a group's work in registers, float32."""

import triton
import triton.language as tl
from torch import Tensor

from r2m_kernels.grebt.ops import empty_results
from r2m_kernels.triton_target import OPTIONS, on_device_of_arguments

# Elements of a tile of whole groups: one group of 1024 rewards, the most there may be, or 128 groups of 8.
TILE = 1024
# 4 elements of the tile a thread: with 8, some widths come close to all of its 255 registers.
WARPS = 8

# log2(e) as the sum of two float32.
LOG2E = tl.constexpr(1.44269502162933349609375)
LOG2E_REST = tl.constexpr(1.92596299112661746e-08)
LN2 = tl.constexpr(0.6931471805599453)

# Groups with larger rewards, whose squares or differences overflow, are computed in a smaller unit: a power of two.
LARGE = tl.constexpr(2.0**60)
SMALL_UNIT = tl.constexpr(2.0**-80)
IN_SMALL_UNITS = tl.constexpr(2.0**80)  # its inverse: a product where a quotient would take a subroutine


@triton.jit
def exp(b_x):
    """e^x of x <= 0 to the last bits: tl.exp rounds x log2(e), a relative error of up to |x| / 2^24 in the result."""
    # Below -104 the result is 0 in float32; a product that overflows would make it NaN.
    b_x = tl.maximum(b_x, -104.0, propagate_nan=tl.PropagateNan.ALL)
    b_power = b_x * LOG2E
    b_rest = tl.fma(b_x, LOG2E, -b_power) + b_x * LOG2E_REST
    return tl.exp2(b_power) * (1 + LN2 * b_rest)  # 2^rest = 1 + rest ln(2)


@triton.jit(do_not_specialize=["n", "K"])
def grebt_loss_kernel(
    rewards,
    pair_scores,
    loss,
    statistics,
    pair,
    gradient,
    alpha,
    eps,
    group_weight,
    stride_rn,
    stride_rk,
    stride_sn,
    stride_sk,
    n,
    K,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    o_k = tl.arange(0, BK)  # [BK]
    m_n = o_n < n  # [BN]
    m_k = (o_k < K)[None]  # [1, BK]
    m_nk = m_n[:, None] & m_k  # [BN, BK]
    o_row = o_n * stride_rn  # [BN]

    # The pair. As in torch, NaN is both the highest and the lowest.
    b_score = tl.load(
        pair_scores + o_n[:, None] * stride_sn + o_k.to(tl.int64)[None] * stride_sk, mask=m_nk, other=0
    )  # [BN, BK]
    if b_score.dtype != tl.float64:  # scores in float64 are compared in float64
        b_score = b_score.to(tl.float32)
    # Scores with NaN have no order: the margin is NaN, and all that follows.
    b_unordered = tl.sum(tl.where(b_score == b_score, 0.0, float("nan")), 1)  # [BN]
    b_up = tl.where(m_k, tl.where(b_score == b_score, b_score, float("inf")), float("-inf"))  # [BN, BK]
    b_down = tl.where(m_k, tl.where(b_score == b_score, b_score, float("-inf")), float("inf"))  # [BN, BK]
    b_highest, b_lowest = tl.max(b_up, 1), tl.min(b_down, 1)  # [BN]
    b_winner = tl.min(tl.where(m_k & (b_up == b_highest[:, None]), o_k[None], BK), 1)  # [BN], the first
    b_loser = tl.max(tl.where(m_k & (b_down == b_lowest[:, None]), o_k[None], -1), 1)  # [BN], the last

    b_r_winner = tl.load(rewards + o_row + b_winner.to(tl.int64) * stride_rk, mask=m_n, other=0).to(tl.float32)  # [BN]
    b_r_loser = tl.load(rewards + o_row + b_loser.to(tl.int64) * stride_rk, mask=m_n, other=0).to(tl.float32)  # [BN]
    b_margin = b_r_winner - b_r_loser + b_unordered  # [BN]
    b_small = exp(-tl.abs(b_margin))  # [BN], in (0, 1]: e^-|margin|
    b_one = 1 + b_small  # [BN]
    # softplus(-margin), with log(1 + small) from the rounded sum and what its rounding lost.
    b_bt = tl.maximum(-b_margin, 0) + tl.log(b_one) - ((b_one - 1) - b_small) / b_one  # [BN]
    # A group whose pair is tied in scores and rewards prefers nothing: of the subgradients there, 0 is the smallest.
    b_tied = (b_highest == b_lowest) & (b_margin == 0)  # [BN]
    b_sigmoid = tl.where(b_margin > 0, b_small, 1) / b_one  # [BN], of -margin
    b_pull = tl.where(b_tied, 0, (1 - alpha) * b_sigmoid)  # [BN]

    # Summed relative to its first, so that equal rewards have exactly their value as mean, and std 0.
    b_first = tl.load(rewards + o_row, mask=m_n, other=0).to(tl.float32)  # [BN]
    b_r = tl.load(rewards + o_row[:, None] + o_k.to(tl.int64)[None] * stride_rk, mask=m_nk, other=0)  # [BN, BK]
    b_r = b_r.to(tl.float32)
    b_unit = tl.where(tl.max(tl.abs(b_r), 1) > LARGE, SMALL_UNIT, 1.0)  # [BN]
    b_first, b_r = b_first * b_unit, b_r * b_unit[:, None]
    b_mean = b_first + tl.sum(tl.where(m_k, b_r - b_first[:, None], 0), 1) / K  # [BN]
    b_x = tl.where(m_k, b_r - b_mean[:, None], 0)  # [BN, BK]
    b_x = tl.where(m_k, b_x - (tl.sum(b_x, 1) / K)[:, None], 0)  # [BN, BK], without the rounding of the mean
    b_std = tl.sqrt(tl.sum(b_x * b_x, 1) / K)  # [BN]
    b_varies = b_std != 0  # [BN], NaN too
    b_z = b_x / tl.where(b_varies, b_std + eps * b_unit, 1)[:, None]  # [BN, BK]
    b_true_std = b_std * tl.where(b_unit < 1, IN_SMALL_UNITS, 1.0)  # [BN]

    # log p = -below - log(sum e^-below), and GRE + log p = mean - below: no differences of rounded p.
    b_below = tl.max(tl.where(m_k, b_z, float("-inf")), 1)[:, None] - b_z  # [BN, BK]
    b_exp = tl.where(m_k, exp(-b_below), 0)  # [BN, BK]
    b_sum = tl.sum(b_exp, 1)  # [BN]
    b_p = b_exp / b_sum[:, None]  # [BN, BK]
    b_mean_below = tl.sum(b_p * b_below, 1)  # [BN], under p
    b_entropy = tl.log(b_sum) + b_mean_below  # [BN]

    # Through z = x / (std + eps), std and the mean: see torch_impl.grebt_loss.
    b_dz = b_p * (b_below - b_mean_below[:, None])  # [BN, BK]
    b_direction = b_x / tl.where(b_varies, b_std, 1)[:, None]  # [BN, BK]
    b_dr = b_dz - (tl.sum(b_dz, 1) / K)[:, None] - b_direction * (tl.sum(b_z * b_dz, 1) / K)[:, None]  # [BN, BK]
    b_dr = tl.where(b_varies[:, None], b_dr / (b_true_std + eps)[:, None], 0)  # [BN, BK]
    b_sign = (o_k[None] == b_loser[:, None]).to(tl.float32) - (o_k[None] == b_winner[:, None]).to(tl.float32)
    b_gradient = alpha * b_dr + b_pull[:, None] * b_sign  # [BN, BK]

    n = n.to(tl.int64)
    tl.store(loss + o_n, group_weight * ((1 - alpha) * b_bt + alpha * b_entropy), mask=m_n)
    tl.store(statistics + o_n, b_bt, mask=m_n)
    tl.store(statistics + n + o_n, b_entropy, mask=m_n)
    tl.store(statistics + 2 * n + o_n, b_true_std, mask=m_n)
    tl.store(pair + o_n, b_winner, mask=m_n)
    tl.store(pair + n + o_n, b_loser, mask=m_n)
    tl.store(gradient + o_n[:, None] * K + o_k[None], group_weight * b_gradient, mask=m_nk)


@on_device_of_arguments
def grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, group_weight: float
) -> tuple[Tensor, ...]:
    """As torch_impl.grebt_loss, in one launch. K <= 1024."""
    n, k = rewards.shape
    results = empty_results(rewards)
    block_k = triton.next_power_of_2(k)
    block_n = TILE // block_k
    grebt_loss_kernel[(triton.cdiv(n, block_n),)](
        rewards,
        pair_scores,
        *results,
        alpha,
        eps,
        group_weight,
        *rewards.stride(),
        *pair_scores.stride(),
        n,
        k,
        BN=block_n,
        BK=block_k,
        num_warps=WARPS,
        **OPTIONS,
    )
    return results
