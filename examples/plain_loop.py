"""R2M in a plain PyTorch loop, without `r2m`: hidden states come a micro-batch at a time, and none are kept.

Every round scores n * K sequences with policy feedback and takes one GREBT step on the cross-attention and the head.
The first round's rewards and gradients are compared with autograd's, from all hidden states at once.
"""

import torch
from torch import Tensor

import r2m_kernels as rk

N, K, TOKENS, MICRO_BATCH, ROUNDS = 4, 8, 48, 8, 12  # prompts, responses to each, tokens of the longest sequence
POLICY_WIDTH, RM_WIDTH, INNER_WIDTH = 128, 96, 64


def run_policy(rows: slice) -> Tensor:
    """Stands for your policy's forward pass: last hidden states [b, S, D_p] of the sequences `rows`."""
    generator = torch.Generator().manual_seed(rows.start)
    return torch.randn(rows.stop - rows.start, TOKENS, POLICY_WIDTH, generator=generator, dtype=torch.bfloat16)


def main() -> None:
    torch.manual_seed(0)
    rte = torch.randn(N * K, RM_WIDTH)  # your reward model's embedding of each text
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (N * K, 1))
    attention, head = rk.SequenceToTokenAttention(RM_WIDTH, POLICY_WIDTH, INNER_WIDTH), rk.RewardHead(RM_WIDTH)
    # Without the head's bias: GREBT does not see a shift of all rewards, so the bias would follow rounding noise.
    optimizer = torch.optim.AdamW([*attention.parameters(), head.weight], lr=3e-3, weight_decay=0.0)
    micro_batches = [slice(i, i + MICRO_BATCH) for i in range(0, N * K, MICRO_BATCH)]

    for t in range(1, ROUNDS + 1):
        weight = rk.time_weight(t, ROUNDS, floor=0.6)
        u = rk.absorbed_query(rte, attention.w_q, attention.w_k)
        g = rk.reward_direction(attention.w_v, attention.w_o, head.weight, weight=weight)
        pooled, gradient = torch.empty_like(u), torch.empty_like(u)
        with torch.no_grad():
            for rows in micro_batches:
                pooled[rows], gradient[rows], _ = rk.attention_pool_with_gradient(
                    u[rows], run_policy(rows), g, mask=mask[rows], scale=1.0
                )
        rewards = rk.reward_from_pools(u, g, pooled, gradient, rte, head.weight, head.bias, weight=weight)
        # Your policy trains on rewards.detach().
        loss = rk.grebt_loss(rewards.view(N, K), alpha=0.3, eps=1e-2)
        optimizer.zero_grad()
        loss.backward()
        if t == 1:
            hidden = torch.cat([run_policy(rows) for rows in micro_batches])
            compare_with_autograd(rewards, attention, head, rte, hidden, mask, weight)
        optimizer.step()
        print(f"round {t:2}: w {weight:.3f}, GREBT {loss.item():.4f}")


def compare_with_autograd(
    rewards: Tensor,
    attention: rk.SequenceToTokenAttention,
    head: rk.RewardHead,
    rte: Tensor,
    hidden: Tensor,
    mask: Tensor,
    weight: float,
) -> None:
    """Equations 1 to 3 one after the other, with a backward pass that reads `hidden` again."""
    expected = head(rk.time_weighted_fusion(attention(rte, hidden, mask=mask), rte, weight))
    trained = [*attention.parameters(), head.weight]
    gradients = torch.autograd.grad(rk.grebt_loss(expected.view(N, K), alpha=0.3, eps=1e-2), trained)
    pairs = [(rewards, expected), *((p.grad, gradient) for p, gradient in zip(trained, gradients, strict=True))]
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    print(f"largest relative difference from autograd: {difference:.1e}")


if __name__ == "__main__":
    main()
