"""The compiled extension on a CPU beside PyTorch, every operator and its alternatives in turn in one run.

    make bench-cpu

A result that float64 does not confirm stops its case before a time is taken.
"""

import pytest
import torch
from torch.nn.functional import softmax

from r2m_kernels import (
    attention_pool,
    attention_pool_dot,
    attention_pool_with_gradient,
    fused_reward,
    grebt_loss,
    sequence_to_token_attention,
    time_weighted_fusion,
)
from r2m_kernels.grebt import reference as grebt_reference

B, S, D = 16, 1024, 2048  # sequences, tokens, width of policy, reward model and cross-attention
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
# Relative Frobenius error allowed: of PyTorch's forms, which round every intermediate result to the dtype.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


@pytest.fixture(autouse=True)
def _same_inputs_every_run():
    torch.manual_seed(0)


def confirmed(providers, exact, dtype):
    """The providers, if all results are close to `exact`, which is in float64."""
    for name, run in providers.items():
        error = (run().double() - exact).norm() / exact.norm()
        assert error <= TOLERANCE[dtype], f"{name}: relative error {error:.2g}"
    return providers


def read(hidden):
    """Reads hidden from memory and does next to nothing with it: PyTorch's sum of its bytes, eight at a time."""
    return lambda: hidden.view(torch.int64).sum()


def two_products(query, hidden):
    """The pool as PyTorch has it: two batched matrix products."""
    p = softmax(hidden @ query[:, :, None], 1)
    return (p.mT @ hidden)[:, 0]


@DTYPES
def test_sequence_to_token_attention(take_turns, dtype):
    rte, hidden = torch.randn(B, D).to(dtype), torch.randn(B, S, D).to(dtype)
    w_q, w_k, w_v, w_o = weights = [(torch.randn(D, D) * D**-0.5).to(dtype) for _ in range(4)]

    def projected(rte, hidden, w_q, w_k, w_v, w_o):
        q, k, v = rte @ w_q.T, hidden @ w_k.T, hidden @ w_v.T
        p = softmax(k @ q[:, :, None] * D**-0.5, 1)
        return (p.mT @ v)[:, 0] @ w_o.T

    def absorbed():
        return two_products(rte @ w_q.T @ w_k * D**-0.5, hidden) @ w_v.T @ w_o.T

    def weights_alone():
        return rte @ w_q.T @ w_k @ w_v.T @ w_o.T

    arguments = rte, hidden, *weights
    providers = {
        "extension": lambda: sequence_to_token_attention(*arguments, impl="extension"),
        "torch": lambda: sequence_to_token_attention(*arguments, impl="torch"),
        "PyTorch, two batched products": absorbed,
        "PyTorch, K and V projected": lambda: projected(*arguments),
    }
    confirmed(providers, projected(*(t.double() for t in arguments)), dtype)
    take_turns(providers | {"the weights' products alone": weights_alone}, rounds=9)


@DTYPES
def test_attention_pool(take_turns, dtype):
    query, hidden = (torch.randn(B, D) * D**-0.5).to(dtype), torch.randn(B, S, D).to(dtype)
    providers = {
        "extension": lambda: attention_pool(query, hidden, scale=1.0, impl="extension"),
        "torch": lambda: attention_pool(query, hidden, scale=1.0, impl="torch"),
        "PyTorch, two batched products": lambda: two_products(query, hidden),
    }
    confirmed(providers, two_products(query.double(), hidden.double()), dtype)
    take_turns(providers | {"one read of hidden": read(hidden)}, hidden.nbytes)


@DTYPES
def test_attention_pool_dot(take_turns, dtype):
    query, hidden = (torch.randn(B, D) * D**-0.5).to(dtype), torch.randn(B, S, D).to(dtype)
    direction = torch.randn(D).to(dtype)
    arguments = query, hidden, direction
    providers = {
        "extension": lambda: attention_pool_dot(*arguments, scale=1.0, impl="extension")[0],
        "torch": lambda: attention_pool_dot(*arguments, scale=1.0, impl="torch")[0],
        "PyTorch, two batched products": lambda: two_products(query, hidden) @ direction,
    }
    confirmed(providers, two_products(query.double(), hidden.double()) @ direction.double(), dtype)
    take_turns(providers | {"one read of hidden": read(hidden)}, hidden.nbytes)


@DTYPES
def test_attention_pool_with_gradient(take_turns, dtype):
    query, hidden = (torch.randn(B, D) * D**-0.5).to(dtype), torch.randn(B, S, D).to(dtype)
    direction = torch.randn(D).to(dtype)

    def by_autograd(query, hidden, direction):
        query = query.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((two_products(query, hidden) @ direction).sum(), query)
        return gradient

    arguments = query, hidden, direction
    providers = {
        "extension": lambda: attention_pool_with_gradient(*arguments, scale=1.0, impl="extension")[1],
        "torch": lambda: attention_pool_with_gradient(*arguments, scale=1.0, impl="torch")[1],
        "PyTorch, two batched products with autograd": lambda: by_autograd(*arguments),
    }
    confirmed(providers, by_autograd(*(t.double() for t in arguments)), dtype)
    take_turns(providers | {"one read of hidden": read(hidden)}, hidden.nbytes)


@DTYPES
def test_time_weighted_fusion(take_turns, dtype):
    aggregated, rte, w = torch.randn(512, 4096).to(dtype), torch.randn(512, 4096).to(dtype), torch.tensor(0.7)
    providers = {
        "extension": lambda: time_weighted_fusion(aggregated, rte, w, impl="extension"),
        "torch": lambda: time_weighted_fusion(aggregated, rte, w, impl="torch"),
        "PyTorch": lambda: (1 - w) * aggregated + w * rte,
    }
    exact = (1 - w.double()) * aggregated.double() + w.double() * rte.double()
    take_turns(confirmed(providers, exact, dtype), 3 * rte.nbytes)


@DTYPES
def test_fused_reward(take_turns, dtype):
    aggregated, rte, w = torch.randn(512, 4096).to(dtype), torch.randn(512, 4096).to(dtype), torch.tensor(0.7)
    head_weight, head_bias = torch.randn(4096).to(dtype), torch.randn(()).to(dtype)
    arguments = aggregated, rte, w, head_weight, head_bias

    def plain(aggregated, rte, w, head_weight, head_bias):
        return ((1 - w) * aggregated + w * rte) @ head_weight + head_bias

    providers = {
        "extension": lambda: fused_reward(*arguments, impl="extension"),
        "torch": lambda: fused_reward(*arguments, impl="torch"),
        "PyTorch": lambda: plain(*arguments),
    }
    take_turns(confirmed(providers, plain(*(t.double() for t in arguments)), dtype), 2 * rte.nbytes)


@pytest.mark.parametrize("n", [64, 2048])
def test_grebt_loss(take_turns, n):
    """Loss and gradient of n groups of 8."""
    rewards = torch.randn(n, 8)

    def gradient(loss, dtype=torch.float32):
        leaf = rewards.to(dtype).requires_grad_()
        (result,) = torch.autograd.grad(loss(leaf), leaf)
        return result

    def plain(leaf):
        margin = leaf.amax(1) - leaf.amin(1)
        z = (leaf - leaf.mean(1, keepdim=True)) / (leaf.std(1, correction=0, keepdim=True) + 1e-2)
        entropy = -(softmax(z, 1) * torch.log_softmax(z, 1)).sum(1)
        return (0.7 * torch.nn.functional.softplus(-margin) + 0.3 * entropy).mean()

    providers = {
        "extension": lambda: gradient(lambda r: grebt_loss(r, eps=1e-2, impl="extension")),
        "torch": lambda: gradient(lambda r: grebt_loss(r, eps=1e-2, impl="torch")),
        "PyTorch": lambda: gradient(plain),
    }
    exact = gradient(lambda r: grebt_reference.grebt_loss(r, alpha=0.3, eps=1e-2)[0].mean(), torch.float64)
    take_turns(confirmed(providers, exact, torch.float32), rounds=50)
