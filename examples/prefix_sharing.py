"""K responses to one prompt share its hidden states: they are stored once, and pooled with K queries at a time.

The pool of a whole sequence is the exact merge of its prompt's pool and its response's. Compares with the plain form,
in which every sequence carries its own copy of the prompt, then takes a training step's gradients from the pools.
"""

import argparse

import torch
from torch import Tensor

import r2m_kernels as rk


def prefix_shared(
    u: Tensor, g: Tensor, prompts: Tensor, responses: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """pooled, gradient [n * K, D] and lse [n * K] of sequences that are a prompt and a response each.

    u [n * K, D], K queries in a row for every prompt; g [D]; prompts [n, S, D], mask [n, S] True where they count;
    responses packed [total, D] with cu_seqlens int32 [n * K + 1].
    """
    n, d = prompts.shape[0], u.shape[1]
    of_prompts = rk.attention_pool_with_gradient(u.view(n, -1, d), prompts, g, mask=mask, scale=1.0)
    of_responses = rk.attention_pool_with_gradient(u, responses, g, cu_seqlens=cu_seqlens, scale=1.0)
    parts = (torch.stack([a.flatten(0, 1), b]) for a, b in zip(of_prompts, of_responses, strict=True))
    return rk.merge_pools_with_gradient(*parts, g, scale=1.0)


def whole_sequences(prompts: Tensor, responses: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The plain form: each response behind its own copy of its prompt, packed, and the cu_seqlens of that."""
    k, s = len(lengths) // prompts.shape[0], prompts.shape[1]
    rows = [torch.cat([prompts[i // k], part]) for i, part in enumerate(responses.split(lengths))]
    return torch.cat(rows), boundaries([s + length for length in lengths], prompts.device)


def boundaries(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="how many")
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each prompt")
    parser.add_argument("--response-tokens", type=int, default=64, help="of each response")
    parser.add_argument("--width", type=int, default=256, help="of the policy's hidden states")
    parser.add_argument("--ragged", action="store_true", help="responses of 0 to --response-tokens tokens")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")

    n, k, d = args.prompts, args.responses, args.width
    lengths = [args.response_tokens] * (n * k)
    if args.ragged:
        lengths = torch.randint(args.response_tokens + 1, (n * k,)).tolist()
    prompts = torch.randn(n, args.prompt_tokens, d, dtype=torch.bfloat16)
    responses = torch.randn(sum(lengths), d, dtype=torch.bfloat16)

    attention, head = rk.SequenceToTokenAttention(d, d, d // 2), rk.RewardHead(d)
    rte, weight = torch.randn(n * k, d), 0.6
    u = rk.absorbed_query(rte, attention.w_q, attention.w_k)
    g = rk.reward_direction(attention.w_v, attention.w_o, head.weight, weight=weight)
    with torch.no_grad():
        pools = prefix_shared(u, g, prompts, responses, boundaries(lengths, u.device))
        sequences, cu_seqlens = whole_sequences(prompts, responses, lengths)
        plain = rk.attention_pool_with_gradient(u, sequences, g, cu_seqlens=cu_seqlens, scale=1.0)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(pools, plain, strict=True))
    shared, copied = prompts.nbytes + responses.nbytes, sequences.nbytes
    print(f"largest relative difference from the plain form: {difference:.1e}")
    print(f"hidden states: {shared:,} bytes instead of {copied:,}, {1 - shared / copied:.0%} fewer")

    pooled, gradient, _ = pools
    rewards = rk.reward_from_pools(u, g, pooled, gradient, rte, head.weight, head.bias, weight=weight)
    loss = rk.grebt_loss(rewards.view(n, k), alpha=0.3, eps=1e-2)
    loss.backward()
    print(f"GREBT {loss.item():.4f}, largest gradient of W_q {attention.w_q.grad.abs().max().item():.1e}")


if __name__ == "__main__":
    main()
