"""The trainable part of R2M as modules: the cross-attention and the scoring head, with float32 weights."""

import torch
from torch import Tensor, nn

from r2m_kernels import checks
from r2m_kernels.cross_attention import sequence_to_token_attention
from r2m_kernels.registration import autograd_ready, full_precision


class SequenceToTokenAttention(nn.Module):
    """Equation 1 of R2M: the reward token embedding attends to the policy's hidden states.

    d_rm         width of the reward model
    d_p          width of the policy
    d            inner width of the attention, split over num_heads heads
    zero_output  start with w_o = 0, so that the fused reward starts as w times the vanilla one

    Weights w_q [d, d_rm], w_k and w_v [d, d_p], w_o [d_rm, d] are float32 (at learning rates near 1e-6 a bfloat16
    weight never moves), drawn from a normal distribution of standard deviation 1 / sqrt(fan_in).
    """

    def __init__(self, d_rm: int, d_p: int, d: int, num_heads: int = 1, zero_output: bool = False) -> None:
        super().__init__()
        checks.heads(num_heads, d)
        self.num_heads = num_heads
        self.w_q = _normal_parameter(d, d_rm)
        self.w_k = _normal_parameter(d, d_p)
        self.w_v = _normal_parameter(d, d_p)
        self.w_o = _normal_parameter(d_rm, d)
        if zero_output:
            nn.init.zeros_(self.w_o)

    def forward(
        self, rte: Tensor, hidden: Tensor, *, cu_seqlens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """rte [B, d_rm] and hidden [B, S, d_p] (or packed [total, d_p] with cu_seqlens) -> aggregated rte [B, d_rm]."""
        return sequence_to_token_attention(
            rte,
            hidden,
            self.w_q,
            self.w_k,
            self.w_v,
            self.w_o,
            num_heads=self.num_heads,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )

    def extra_repr(self) -> str:
        d, d_rm = self.w_q.shape
        return f"d_rm={d_rm}, d_p={self.w_k.shape[1]}, d={d}, num_heads={self.num_heads}"


class RewardHead(nn.Module):
    """Linear scoring head phi . F + b of equation 3, for embeddings of width d_rm: weight [d_rm] and a 0-dim bias.

    Float32; the weight starts normal with standard deviation 1 / sqrt(d_rm), the bias at 0.
    """

    def __init__(self, d_rm: int) -> None:
        super().__init__()
        self.weight = _normal_parameter(d_rm)
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32))

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding [B, d_rm] -> reward float32 [B]."""
        checks.floating(embedding=embedding, weight=self.weight)
        checks.dimensions("embedding", embedding, "[B, d_rm]")
        checks.shape("embedding", embedding, ((embedding.shape[0], self.weight.shape[0]), "[B, d_rm]"))
        return _linear_head(embedding, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"d_rm={self.weight.shape[0]}"


@full_precision
def _linear_head(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return autograd_ready(embedding).to(weight.dtype) @ weight + bias


def _normal_parameter(*shape: int) -> nn.Parameter:
    """Standard deviation 1 / sqrt(fan_in), where fan_in is the last dimension."""
    return nn.Parameter(torch.empty(shape, dtype=torch.float32).normal_(std=shape[-1] ** -0.5))
