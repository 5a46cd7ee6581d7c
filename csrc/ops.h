// The ops of this library. One backend (cpu/ or cuda/) implements them, and registration.cpp registers them for it.
//
// Callers have checked every argument, made every result and the workspace; nothing here allocates, waits for a device
// or keeps a tensor. Sums are in float32 or better. Results are contiguous.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace r2m {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// B sequences of S rows of D, or packed ones (`total` rows), and H queries for each; of one query, H may be left out of
// all shapes that follow.
//   query       float32 [B, H, D], contiguous, with the softmax scale in it
//   hidden      float32, bfloat16 or float16 [B, S, D], or [total, D] with cu_seqlens; the last stride is 1
//   direction   float32 [B, H, D] of any strides (0 where it is shared)
//   cu_seqlens  int32 [B + 1], contiguous, with 0 <= cu_seqlens[b] <= cu_seqlens[b + 1] <= total
//   mask        bool [B, S] of any strides
// Results, float32; what is absent is not computed:
//   pooled      [B, H, D] the softmax-weighted mean of the rows
//   gradient    [B, H, D] their covariance times direction
//   value       [B, H] direction . pooled, present with direction
//   lse         [B, H] log-sum-exp of the scores
//   max_sum        [2, B, H] the largest score m, and the sum of exp(score - m)
//   scores      [1 or 2, H, rows] query . row and, with direction, direction . row, of rows that are attended
//   workspace   1-D
// A sequence is cut into chunks of `chunk` rows, whose pools are merged in order. Those of a sequence that has at least
// two are in the workspace, which has room for `partials` of them: pooled [partials, H, D] and gradient [partials, H, D]
// where they are wanted, then max_sum [2, partials, H] and value [partials, H]. Chunk `number` of sequence b is in row
// b * chunks + number, with chunks = ceil(S / chunk); of packed sequences in row 2 * cu_seqlens[b] // chunk + number.
void attention_pool(
    const Tensor& query, const Tensor& hidden, const OptionalTensor& direction, const OptionalTensor& cu_seqlens,
    const OptionalTensor& mask, const OptionalTensor& pooled, const OptionalTensor& gradient,
    const OptionalTensor& value, const Tensor& lse, const Tensor& max_sum, const OptionalTensor& scores,
    const Tensor& workspace, int64_t chunk, int64_t partials);

// grad_hidden, shape and dtype of hidden: the sum over queries of p_j (t_j - value + grad_lse) query + p_j direction,
// with p_j and t_j from what attention_pool kept in max_sum, value and scores; 0 in rows that are not attended.
void attention_pool_grad_hidden(
    const Tensor& query, const Tensor& direction, const Tensor& scores, const Tensor& max_sum, const Tensor& value,
    const Tensor& grad_lse, const OptionalTensor& cu_seqlens, const OptionalTensor& mask, const Tensor& grad_hidden);

// fused = (1 - w) aggregated + w rte, [B, D]. aggregated, rte and fused in any of the three dtypes and the first two of
// any strides; weight w is float32, 0-dim.
void time_weighted_fusion(const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& fused);

// grad_aggregated = (1 - w) grad and grad_rte = w grad; grad of any strides.
void time_weighted_fusion_backward(
    const Tensor& grad, const Tensor& weight, const OptionalTensor& grad_aggregated, const OptionalTensor& grad_rte);

// reward = head_weight . fused + head_bias, float32 [B]; head_weight [D] of any stride, head_bias one element.
void fused_reward(
    const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& head_weight,
    const OptionalTensor& head_bias, const Tensor& reward);

// Gradients of fused_reward for grad, float32 [B] of any stride. Rows are summed in blocks of `block`; partial_sums,
// float32 [ceil(B / block), D + 1], takes the sums of a block: of grad * fused, and of grad.
void fused_reward_backward(
    const Tensor& grad, const Tensor& aggregated, const Tensor& rte, const Tensor& weight, const Tensor& head_weight,
    const OptionalTensor& grad_aggregated, const OptionalTensor& grad_rte, const Tensor& grad_head_weight,
    const OptionalTensor& grad_head_bias, const Tensor& partial_sums, int64_t block);

// Of every group: loss [n], times group_weight; statistics [3, n], which are BT, the entropy and std; pair [2, n], int64,
// the indices of winner and loser; gradient [n, K] of loss. rewards and pair_scores are [n, K] of any strides;
// pair_scores may be float64. NaN in either makes its group NaN.
void grebt_loss(
    const Tensor& rewards, const Tensor& pair_scores, double alpha, double eps, double group_weight, const Tensor& loss,
    const Tensor& statistics, const Tensor& pair, const Tensor& gradient);

}  // namespace r2m
