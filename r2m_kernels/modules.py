"""The trainable part of R2M as modules: the cross-attention, the scoring head, and both as one."""

from typing import Any

import torch
from torch import Tensor, nn

from r2m_kernels import checks
from r2m_kernels.cross_attention import policy_feedback_reward, sequence_to_token_attention
from r2m_kernels.registration import autograd_ready, full_precision, matrix_vector


class SequenceToTokenAttention(nn.Module):
    """Equation 1 of R2M: the reward token embedding attends to the policy's hidden states.

    d_rm         width of the reward model
    d_p          width of the policy
    d            inner width of the attention, split over num_heads heads
    zero_output  start with w_o = 0, so that the fused reward starts as w times the vanilla one
    device, dtype  of the weights, by default the current default device, and float32 whatever the default dtype (at
                 learning rates near 1e-6 a bfloat16 weight never moves)

    Weights w_q [d, d_rm], w_k and w_v [d, d_p], w_o [d_rm, d] are drawn from a normal distribution of standard
    deviation 1 / sqrt(fan_in), by `reset_parameters` again.
    """

    def __init__(
        self,
        d_rm: int,
        d_p: int,
        d: int,
        num_heads: int = 1,
        zero_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.heads(num_heads, d)
        self.num_heads = num_heads
        self.zero_output = zero_output
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.w_q = nn.Parameter(torch.empty(d, d_rm, **where))
        self.w_k = nn.Parameter(torch.empty(d, d_p, **where))
        self.w_v = nn.Parameter(torch.empty(d, d_p, **where))
        self.w_o = nn.Parameter(torch.empty(d_rm, d, **where))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for weight in (self.w_q, self.w_k, self.w_v, self.w_o):
            weight.normal_(std=weight.shape[1] ** -0.5)
        if self.zero_output:
            self.w_o.zero_()

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
    """Linear scoring head phi . F + b of equation 3, for embeddings of width d_rm: weight [d_rm] and bias [1].

    device, dtype  of both, by default the current default device, and float32 whatever the default dtype

    The weight starts normal with standard deviation 1 / sqrt(d_rm), the bias at 0, as `reset_parameters` sets them
    again. Weights that were saved with a 0-dim bias load, too.
    """

    def __init__(self, d_rm: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_rm, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))  # not 0-dim: FSDP shards no scalars
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=self.weight.shape[0] ** -0.5)
        self.bias.zero_()

    def forward(self, embedding: Tensor) -> Tensor:
        """embedding [B, d_rm] -> reward float32 [B] (float64 for float64), whatever the dtype of the weights."""
        checks.floating(embedding=embedding, weight=self.weight)
        checks.dimensions("embedding", embedding, "[B, d_rm]")
        checks.shape("embedding", embedding, ((embedding.shape[0], self.weight.shape[0]), "[B, d_rm]"))
        return _linear_head(embedding, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if isinstance(bias, Tensor) and bias.ndim == 0:
            state_dict[f"{prefix}bias"] = bias[None]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"d_rm={self.weight.shape[0]}"


class PolicyFeedbackReward(nn.Module):
    """Equations 1 to 3 of R2M with one read of the hidden states: `policy_feedback_reward` with its weights.

    attention  SequenceToTokenAttention and
    head       RewardHead, made of the same arguments: d_rm, d_p, d, num_heads, zero_output, device, dtype

    As one module it is what FSDP wraps: the weights are whole in its forward.
    """

    def __init__(
        self,
        d_rm: int,
        d_p: int,
        d: int,
        num_heads: int = 1,
        zero_output: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.attention = SequenceToTokenAttention(d_rm, d_p, d, num_heads, zero_output, device, dtype)
        self.head = RewardHead(d_rm, device, dtype)

    def forward(
        self,
        rte: Tensor,
        hidden: Tensor,
        *,
        weight: float | Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        hidden_grad: bool = False,
        impl: str = "auto",
    ) -> Tensor:
        """Rewards float32 [B] (float64 for float64); arguments and errors as in `policy_feedback_reward`."""
        return policy_feedback_reward(
            rte,
            hidden,
            w_q=self.attention.w_q,
            w_k=self.attention.w_k,
            w_v=self.attention.w_v,
            w_o=self.attention.w_o,
            head_weight=self.head.weight,
            head_bias=self.head.bias,
            weight=weight,
            num_heads=self.attention.num_heads,
            cu_seqlens=cu_seqlens,
            mask=mask,
            hidden_grad=hidden_grad,
            impl=impl,
        )


@full_precision
def _linear_head(embedding: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = checks.accumulate_dtype(weight)
    return matrix_vector(autograd_ready(embedding).to(dtype), weight.to(dtype)) + bias.to(dtype)
