"""Inputs as a training run has them, and functions that return everything the ops make of them, gradients included.

All sizes are a 7B policy's, and few: every combination of layout, width, queries and dtype is compiled once a run.
"""

import functools

import torch
from numerics import ragged

import r2m_kernels as rk

WIDTH, QUERIES, LENGTHS = 4096, 32, [300, 0, 1, 257, 128]
LAYOUTS = ["dense", "masked", "packed", "packed, 32 queries"]


def pool_inputs(layout):
    """Sequences of LENGTHS, in an order that changes from call to call."""
    lengths = [LENGTHS[i] for i in torch.randperm(len(LENGTHS)).tolist()]
    batch, longest = len(lengths), max(lengths)
    inputs = {"query": torch.randn(batch, *[QUERIES] * ("queries" in layout), WIDTH), "direction": torch.randn(WIDTH)}
    if "packed" in layout:  # 7 rows belong to no sequence
        return inputs | {"hidden": torch.randn(sum(lengths) + 7, WIDTH).bfloat16(), "cu_seqlens": ragged(lengths)}
    inputs["hidden"] = torch.randn(batch, longest, WIDTH).bfloat16()
    if layout == "masked":
        within = torch.arange(longest) < torch.tensor(lengths)[:, None]
        inputs["mask"] = within & (torch.rand(batch, longest) < 0.8)
    return inputs


def pool(query, hidden, direction, **where):
    """Every output and gradient of the three forms, a row a sequence; the last one has the shape of hidden."""
    leaves = query.detach().requires_grad_(), hidden.detach().requires_grad_()
    pooled, lse = rk.attention_pool(*leaves, return_lse=True, **where)
    upstream = query.cos(), torch.ones_like(lse)  # a sequence's goes with the sequence
    grad_query, grad_hidden = torch.autograd.grad((pooled, lse), leaves, upstream)
    one_read = rk.attention_pool_with_gradient(query, hidden, direction, **where)
    scores = rk.attention_pool_dot(query, hidden, direction, **where)
    return [pooled.detach(), lse.detach(), grad_query, *one_read, *scores, grad_hidden]


def fusion_inputs():
    inputs = {name: torch.randn(32, WIDTH).bfloat16() for name in ("aggregated", "rte")}
    return inputs | {"weight": torch.rand(()), "head_weight": torch.randn(WIDTH), "head_bias": torch.randn(())}


def fusion(weight, **inputs):
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    outputs = (
        rk.fused_reward(weight=weight, **leaves),
        rk.time_weighted_fusion(leaves["aggregated"], leaves["rte"], weight),
    )
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [out.detach().cos() for out in outputs])
    return [*(out.detach() for out in outputs), *gradients]


def grebt_inputs():
    return {"rewards": torch.randn(64, 8), "pair_scores": torch.randn(64, 8)}


def grebt(rewards, pair_scores):
    leaf = rewards.detach().requires_grad_()
    loss, stats = rk.grebt_loss(leaf, pair_scores=pair_scores, reduction="none", return_stats=True)
    mean = rk.grebt_loss(leaf, eps=1e-2)
    gradients = torch.autograd.grad((loss, mean), leaf, (pair_scores[:, 0].contiguous(), torch.ones_like(mean)))
    return [loss.detach(), mean.detach(), *stats.values(), *gradients]


def merge_inputs():
    shapes = {"pooled": (3, 8, WIDTH), "gradient": (3, 8, WIDTH), "lse": (3, 8), "direction": (WIDTH,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def merge(pooled, gradient, lse, direction):
    return [*rk.merge_pools(pooled, lse), *rk.merge_pools_with_gradient(pooled, gradient, lse, direction, scale=0.5)]


# Name -> the function and what makes its inputs; each call makes others, of the same shapes.
OPERATIONS = {f"pool, {layout}": (pool, functools.partial(pool_inputs, layout)) for layout in LAYOUTS}
OPERATIONS |= {"fusion": (fusion, fusion_inputs), "grebt": (grebt, grebt_inputs), "merge": (merge, merge_inputs)}


def step_inputs(batch=8, length=40, width=256):
    d_rm, d = width // 2, width // 4
    shapes = {"w_q": (d, d_rm), "w_k": (d, width), "w_v": (d, width), "w_o": (d_rm, d)}
    inputs = {name: shape[1] ** -0.5 * torch.randn(shape) for name, shape in shapes.items()}
    inputs |= {"rte": torch.randn(batch, d_rm), "head_weight": torch.randn(d_rm), "head_bias": torch.randn(())}
    inputs |= {"hidden": torch.randn(batch, length, width).bfloat16(), "mask": torch.rand(batch, length) > 0.3}
    return inputs | {"weight": torch.tensor(0.6)}


def step(hidden, mask, weight, **inputs):
    """A reward model's training step: GREBT of rewards with policy feedback, and the gradient of every weight."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    loss = step_loss(hidden=hidden, mask=mask, weight=weight, **leaves)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def step_loss(**inputs):
    return rk.grebt_loss(rk.policy_feedback_reward(**inputs).view(-1, 4), eps=1e-2)


def assert_same_bits(results, expected):
    for i, (one, other) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(one, other), (
            f"result {i} differs, by up to {(one.double() - other.double()).abs().max():.3g}"
        )
