"""examples/prefix_sharing.py: prompts pooled once for all of their responses give the pools of whole sequences."""

import runpy
from pathlib import Path

import pytest
import torch
from numerics import assert_accurate, gradient_by_autograd, ragged

from r2m_kernels import absorbed_query, grebt_loss, policy_feedback_reward, reward_direction, reward_from_pools
from r2m_kernels.attention_pool import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PROMPTS, D = [40, 1, 23], 64
RESPONSES = [70, 0, 1, 33, 5, 129]  # of 3 prompts 2 each, or of 1 prompt 6


def prefix_shared(*args, **kwargs):
    path = Path(__file__).parents[2] / "examples" / "prefix_sharing.py"
    return runpy.run_path(str(path))["prefix_shared"](*args, **kwargs)


def mixed_lengths(n, dtype):
    """Left-padded prompts with their mask, packed responses, and the whole sequences packed, each with cu_seqlens."""
    longest, k = max(PROMPTS[:n]), len(RESPONSES) // n
    prompts, responses = torch.randn(n, longest, D).to(dtype), torch.randn(sum(RESPONSES), D).to(dtype)
    mask = torch.arange(longest) >= longest - torch.tensor(PROMPTS[:n])[:, None]
    parts = responses.split(RESPONSES)
    sequences = [torch.cat([prompts[i // k][mask[i // k]], part]) for i, part in enumerate(parts)]
    shared = {"prompts": prompts, "responses": responses, "cu_seqlens": ragged(RESPONSES), "mask": mask}
    return shared, torch.cat(sequences), ragged([rows.shape[0] for rows in sequences])


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_shared_prompts_match_the_equation_of_whole_sequences(dtype, n):
    shared, sequences, cu_seqlens = mixed_lengths(n, dtype)
    out = F64 if dtype is F64 else F32
    u, g = 0.2 * torch.randn(len(RESPONSES), D, dtype=out), torch.randn(D, dtype=out)
    pooled, gradient, lse = prefix_shared(u, g, **shared)
    where = {"cu_seqlens": cu_seqlens, "scale": 1.0}
    (exact_c, exact_lse), (plain_c, plain_lse) = (
        reference.attention_pool(u.to(precision), sequences.to(precision), **where) for precision in (F64, out)
    )
    exact_v, plain_v = (gradient_by_autograd(u, sequences, g, precision, **where) for precision in (F64, out))
    assert_accurate(pooled, exact_c, plain_c, "pooled")
    assert_accurate(gradient, exact_v, plain_v, "gradient")
    assert_accurate(lse, exact_lse, plain_lse, "lse")


def test_a_training_step_on_shared_prompts_gives_the_gradients_of_whole_sequences():
    n, weight = 3, 0.6
    shared, sequences, cu_seqlens = mixed_lengths(n, F64)
    shapes = {"w_q": (16, 24), "w_k": (16, D), "w_v": (16, D), "w_o": (24, 16), "head_weight": (24,), "head_bias": ()}
    leaves = {name: 0.3 * torch.randn(shape, dtype=F64) for name, shape in shapes.items()}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    w_q, w_k, w_v, w_o, head_weight, head_bias = leaves.values()
    rte = torch.randn(len(RESPONSES), 24, dtype=F64)
    u, g = absorbed_query(rte, w_q, w_k), reward_direction(w_v, w_o, head_weight, weight=weight)
    with torch.no_grad():
        pooled, gradient, _ = prefix_shared(u, g, **shared)
    rewards = reward_from_pools(u, g, pooled, gradient, rte, head_weight, head_bias, weight=weight)
    expected = policy_feedback_reward(rte, sequences, *leaves.values(), weight=weight, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(rewards, expected, rtol=1e-12, atol=1e-12)
    # The loss is of differences of rewards: the bias has no gradient but rounding.
    for one, other in zip(
        *(torch.autograd.grad(grebt_loss(r.view(n, -1)), list(leaves.values())) for r in (rewards, expected)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
