"""Kernels of R2M, the real-time aligned reward model (arXiv 2601.22664): needs torch only.

    w = time_weight(step, total_steps, floor=0.6)
    reward = PolicyFeedbackReward(d_rm, d_p, d)(rte, hidden, weight=w)
    loss = grebt_loss(reward.view(n, K))

`hidden` are the policy's last-layer hidden states, `rte` the reward model's token embeddings. Every function
documents shapes, dtypes and errors. All run eagerly, under torch.compile(fullgraph=True) and, where a formula has a
gradient, under autograd. Sums are in float32 (float64 for float64 inputs) whatever the autocast state.

All can be captured in CUDA graphs. A graph keeps the numbers that it was captured with, `weight` too if it is a float:
give a 0-dim tensor there, and write every round's weight into it.
"""

from r2m_kernels.attention_pool import attention_pool, attention_pool_dot, attention_pool_with_gradient
from r2m_kernels.attention_pool.merge import merge_pools, merge_pools_with_gradient
from r2m_kernels.cross_attention import (
    absorbed_query,
    policy_feedback_reward,
    reward_direction,
    reward_from_pools,
    sequence_to_token_attention,
)
from r2m_kernels.dispatch import available_implementations
from r2m_kernels.fusion import fused_reward, time_weight, time_weighted_fusion
from r2m_kernels.grebt import grebt_loss
from r2m_kernels.modules import PolicyFeedbackReward, RewardHead, SequenceToTokenAttention

__version__ = "0.1.0"  # pyproject.toml takes it from here

__all__ = [
    "PolicyFeedbackReward",
    "RewardHead",
    "SequenceToTokenAttention",
    "absorbed_query",
    "attention_pool",
    "attention_pool_dot",
    "attention_pool_with_gradient",
    "available_implementations",
    "fused_reward",
    "grebt_loss",
    "merge_pools",
    "merge_pools_with_gradient",
    "policy_feedback_reward",
    "reward_direction",
    "reward_from_pools",
    "sequence_to_token_attention",
    "time_weight",
    "time_weighted_fusion",
]
