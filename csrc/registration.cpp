// Registers the ops of ops.h as torch.ops.<R2M_NAMESPACE>.<name> for tensors on R2M_DEVICE (CPU or CUDA).
#include "ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(R2M_NAMESPACE, library) {
  library.def(
      "attention_pool(Tensor query, Tensor hidden, Tensor? direction, Tensor? cu_seqlens, Tensor? mask,"
      " Tensor(a!)? pooled, Tensor(b!)? gradient, Tensor(c!)? value, Tensor(d!) lse, Tensor(e!) max_sum,"
      " Tensor(f!)? scores, Tensor(g!) workspace, int chunk, int partials) -> ()");
  library.def(
      "attention_pool_grad_hidden(Tensor query, Tensor direction, Tensor scores, Tensor max_sum, Tensor value,"
      " Tensor grad_lse, Tensor? cu_seqlens, Tensor? mask, Tensor(a!) grad_hidden) -> ()");
  library.def("time_weighted_fusion(Tensor aggregated, Tensor rte, Tensor weight, Tensor(a!) fused) -> ()");
  library.def(
      "time_weighted_fusion_backward(Tensor grad, Tensor weight, Tensor(a!)? grad_aggregated,"
      " Tensor(b!)? grad_rte) -> ()");
  library.def(
      "fused_reward(Tensor aggregated, Tensor rte, Tensor weight, Tensor head_weight, Tensor? head_bias,"
      " Tensor(a!) reward) -> ()");
  library.def(
      "fused_reward_backward(Tensor grad, Tensor aggregated, Tensor rte, Tensor weight, Tensor head_weight,"
      " Tensor(a!)? grad_aggregated, Tensor(b!)? grad_rte, Tensor(c!) grad_head_weight, Tensor(d!)? grad_head_bias,"
      " Tensor(e!) partial_sums, int block) -> ()");
  library.def(
      "grebt_loss(Tensor rewards, Tensor pair_scores, float alpha, float eps, float group_weight, Tensor(a!) loss,"
      " Tensor(b!) statistics, Tensor(c!) pair, Tensor(d!) gradient) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(R2M_NAMESPACE, R2M_DEVICE, library) {
  library.impl("attention_pool", TORCH_BOX(&r2m::attention_pool));
  library.impl("attention_pool_grad_hidden", TORCH_BOX(&r2m::attention_pool_grad_hidden));
  library.impl("time_weighted_fusion", TORCH_BOX(&r2m::time_weighted_fusion));
  library.impl("time_weighted_fusion_backward", TORCH_BOX(&r2m::time_weighted_fusion_backward));
  library.impl("fused_reward", TORCH_BOX(&r2m::fused_reward));
  library.impl("fused_reward_backward", TORCH_BOX(&r2m::fused_reward_backward));
  library.impl("grebt_loss", TORCH_BOX(&r2m::grebt_loss));
}
