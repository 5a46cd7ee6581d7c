"""Views of every kind give the values of their copies: of every argument and of the gradients from above."""

import pytest
import torch
from numerics import ragged
from views import KINDS, copy, view

import r2m_kernels as rk

B, H, S, D, D_RM, D_IN = 3, 2, 11, 64, 12, 8
BF16 = torch.bfloat16
# Of these there are gradients.
LEAVES = {"query", "hidden", "aggregated", "rte", "head_weight", "head_bias", "rewards", "pooled", "lse", "u", "g"}
LEAVES |= {"w_q", "w_k", "w_v", "w_o", "v_bias"}


def pool(**arguments):
    return {"query": torch.randn(B, H, D), "hidden": torch.randn(B, S, D).to(BF16), **arguments}


def packed(**arguments):
    """With rows before the first sequence and behind the last one."""
    hidden = torch.randn(B * S, D).to(BF16)
    return {"query": torch.randn(B, H, D), "hidden": hidden, "cu_seqlens": 2 + ragged([9, 0, 15]), **arguments}


def masked(**arguments):
    return pool(mask=torch.rand(B, S) > 0.4, **arguments)


def embeddings():
    return {"aggregated": torch.randn(B, D), "rte": torch.randn(B, D).to(BF16), "weight": torch.tensor(0.3)}


def head(width):
    return {"head_weight": torch.randn(width), "head_bias": torch.randn(())}


def attention():
    shapes = {"rte": (B, D_RM), "w_q": (D_IN, D_RM), "w_k": (D_IN, D), "w_v": (D_IN, D), "w_o": (D_RM, D_IN)}
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def pools():
    shapes = {"u": (B, H, D), "g": (H, D), "pooled": (B, H, D), "gradient": (B, H, D), "rte": (B, D_RM)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | head(D_RM) | {"weight": torch.tensor(0.3)}


def with_lse(**arguments):
    return rk.attention_pool(**arguments, return_lse=True)


def without_gradient(function):
    def run(**arguments):
        with torch.no_grad():
            return function(**arguments)

    return run


def only(arguments, *names):
    return {name: arguments[name] for name in names}


def parts():
    return {"pooled": torch.randn(2, B, D), "lse": torch.randn(2, B)}


EXAMPLES = {
    "attention_pool": (with_lse, pool),
    "attention_pool masked": (with_lse, masked),
    "attention_pool packed": (with_lse, packed),
    "attention_pool_dot": (rk.attention_pool_dot, lambda: masked(direction=torch.randn(B, H, D))),
    "attention_pool_dot packed": (rk.attention_pool_dot, lambda: packed(direction=torch.randn(H, D))),
    "attention_pool_with_gradient": (
        without_gradient(rk.attention_pool_with_gradient),
        lambda: masked(direction=torch.randn(B, H, D)),
    ),
    "attention_pool_with_gradient packed": (
        without_gradient(rk.attention_pool_with_gradient),
        lambda: packed(direction=torch.randn(D)),
    ),
    "time_weighted_fusion": (rk.time_weighted_fusion, embeddings),
    "fused_reward": (rk.fused_reward, lambda: embeddings() | head(D)),
    "grebt_loss": (
        lambda **arguments: rk.grebt_loss(**arguments, eps=0.1, reduction="none"),
        lambda: {"rewards": torch.randn(B, 5), "pair_scores": torch.randn(B, 5)},
    ),
    "merge_pools": (rk.merge_pools, parts),
    "merge_pools_with_gradient": (
        without_gradient(lambda **arguments: rk.merge_pools_with_gradient(**arguments, scale=0.5)),
        lambda: parts() | {"gradient": torch.randn(2, B, D), "direction": torch.randn(D)},
    ),
    "absorbed_query": (rk.absorbed_query, lambda: only(attention(), "rte", "w_q", "w_k")),
    "reward_direction": (
        lambda **arguments: rk.reward_direction(**arguments, num_heads=2),
        lambda: only(attention() | head(D_RM) | embeddings(), "w_v", "w_o", "head_weight", "weight"),
    ),
    "reward_from_pools": (rk.reward_from_pools, pools),
    "policy_feedback_reward": (
        lambda *, hidden, **arguments: rk.policy_feedback_reward(hidden=hidden.detach(), **arguments),
        lambda: attention() | {"hidden": torch.randn(B, S, D)} | head(D_RM) | {"weight": torch.tensor(0.3)},
    ),
    "policy_feedback_reward hidden_grad": (
        lambda **arguments: rk.policy_feedback_reward(**arguments, hidden_grad=True),
        lambda: attention() | {"hidden": torch.randn(B, S, D)} | head(D_RM) | {"weight": torch.tensor(0.3)},
    ),
    "sequence_to_token_attention": (
        rk.sequence_to_token_attention,
        lambda: attention() | {"hidden": torch.randn(B, S, D), "v_bias": torch.randn(D_IN)},
    ),
}


def run(function, arguments):
    """Outputs, and the leaves that they may depend on."""
    leaves = {name: t.detach().requires_grad_() for name, t in arguments.items() if name in LEAVES}
    outputs = function(**(arguments | leaves))
    return outputs if isinstance(outputs, tuple) else (outputs,), tuple(leaves.values())


def results(function, arguments, upstream):
    """Outputs and gradients."""
    outputs, leaves = run(function, arguments)
    if not outputs[0].requires_grad:
        return outputs
    gradients = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return *outputs, *(gradient for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_view_gives_what_its_copy_gives(name, kind):
    function, make = EXAMPLES[name]
    arguments = make()
    upstream = [torch.randn_like(output) for output in run(function, arguments)[0]]
    for argument, tensor in arguments.items():
        seen = view(kind, tensor)
        one = results(function, arguments | {argument: seen}, upstream)
        other = results(function, arguments | {argument: copy(seen)}, upstream)
        for value, expected in zip(one, other, strict=True):
            torch.testing.assert_close(value, expected)
    seen = [view(kind, gradient) for gradient in upstream]
    one, other = results(function, arguments, seen), results(function, arguments, [copy(gradient) for gradient in seen])
    for value, expected in zip(one, other, strict=True):
        torch.testing.assert_close(value, expected)
