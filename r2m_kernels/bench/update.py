"""One update of the reward model's small part: rewards of a round, GREBT, gradients, AdamW, from cached RTEs and h."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import r2m_kernels as rk
from r2m_kernels.bench.measure import TOLERANCE, Run, measure, release
from r2m_kernels.bench.ops import OURS, WEIGHT, Entries, exact_reward, in_float64, make_weights, too_much
from r2m_kernels.bench.plain import ALPHA, EPS, absorbed_reward, plain_grebt, projected_reward, softmax_attention
from r2m_kernels.bench.results import Row, dtype_name
from r2m_kernels.grebt import reference as grebt_reference

# At most, in a micro-batch: 64 sequences of the paper's dialogue round are 0.5 GB of h.
GROUPS_AT_ONCE = 8
RESIDENT, STREAMED = "h resident", "h streamed"  # the cases


def run_updates(
    shape: dict[str, int],
    device: torch.device,
    *,
    best_bandwidth: float,
    seconds: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[list[Row]]:
    """Measure the update of a round of shape n K S D_p D_rm d, with h resident, then streamed.

    Streamed, one micro-batch of h is there at a time, as the policy's forward pass hands them over. Here it is always
    the same one, and the resident h is made of copies of it: both forms have the same result. Plain PyTorch takes both
    in micro-batches and accumulates gradients, since its keys and values of a whole round would not fit. Row.held_bytes
    are weights and AdamW's state; Row.peak_bytes come and go beside them.
    """
    tokens = shape["n"] * shape["K"] * shape["S"]
    at_once = tokens // _micro_batches(shape["n"])
    # Plain PyTorch's keys, values and their gradients, the same weights for every provider, and float64 copies.
    plain_bytes = 5 * at_once * shape["d"] * dtype.itemsize + 24 * _weight_bytes(shape)
    for case, rows in ((RESIDENT, tokens + at_once), (STREAMED, at_once)):
        missing = too_much(rows * shape["D_p"] * dtype.itemsize + plain_bytes, device)
        if missing:
            yield [replace(_row(case, shape, dtype, "all"), status=missing)]
            continue
        entries, exact = build(case, shape, device, dtype)
        yield measure(entries, exact, TOLERANCE[dtype], device=device, best_bandwidth=best_bandwidth, seconds=seconds)
        del entries, exact
        release(device)


def build(case: str, shape: dict[str, int], device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Entries:
    """Every provider of the update with h RESIDENT or STREAMED, with a row to fill in; and the exact gradients."""
    torch.manual_seed(0)
    k, sequences, repeats = shape["K"], shape["n"] * shape["K"], _micro_batches(shape["n"])
    part = torch.randn(sequences // repeats, shape["S"], shape["D_p"], dtype=dtype, device=device)
    rte = torch.randn(sequences, shape["D_rm"], device=device)
    weights = make_weights(shape, device)
    exact = _exact_gradients(rte, part, weights, k)
    parts = kernel_parts = [part] * repeats
    if case == RESIDENT:
        kernel_parts = [part.repeat(repeats, 1, 1)]  # no reason to take it in pieces
        parts = list(kernel_parts[0].chunk(repeats))
    row = partial(_row, case, shape, dtype)
    plain: dict[str, Callable[..., Tensor]] = {
        "projected": partial(projected_reward, attend=softmax_attention),
        "absorbed": absorbed_reward,
    }
    entries = [_plain(row(f"plain PyTorch, {name}"), form, rte, parts, weights, k) for name, form in plain.items()]
    return entries + [_ours(row(impl), impl, rte, kernel_parts, weights, k) for impl in OURS], exact


def _row(case: str, shape: dict[str, int], dtype: torch.dtype, provider: str) -> Row:
    """Bytes that must move: h and the weights read, gradients written and read, AdamW's two moments read, and weights
    and moments written."""
    h_bytes = shape["n"] * shape["K"] * shape["S"] * shape["D_p"] * dtype.itemsize
    moved = h_bytes + 8 * _weight_bytes(shape)
    named = (case, provider, dtype_name(dtype), dict(shape))
    return Row("update", "reward_model_update", "update", *named, ideal_bytes=moved)


def _micro_batches(n: int) -> int:
    """Of as many whole groups as divide n."""
    return n // next(groups for groups in range(GROUPS_AT_ONCE, 0, -1) if n % groups == 0)


def _weight_bytes(shape: dict[str, int]) -> int:
    """W_q, W_k, W_v and W_o, float32; beside them the head is nothing."""
    return 4 * shape["d"] * 2 * (shape["D_p"] + shape["D_rm"])


def _exact_gradients(rte: Tensor, part: Tensor, weights: list[Tensor], k: int) -> list[Tensor]:
    doubles = in_float64(weights)
    rows = (part[i % len(part)] for i in range(len(rte)))
    rewards = exact_reward(rte.double(), rows, doubles, 1, WEIGHT)
    loss = grebt_reference.grebt_loss(rewards.view(-1, k), alpha=ALPHA, eps=EPS)[0].mean()
    return list(torch.autograd.grad(loss, doubles[:-1]))


def _plain(
    row: Row,
    form: Callable[..., Tensor],
    rte: Tensor,
    parts: list[Tensor],
    weights: list[Tensor],
    k: int,
) -> tuple[Row, Run]:
    def backward(weights: list[Tensor]) -> None:
        for embeddings, hidden in zip(rte.chunk(len(parts)), parts, strict=True):
            rewards = form(embeddings, hidden, weights, mask=None, heads=1, weight=WEIGHT)
            (plain_grebt(rewards.view(-1, k)) / len(parts)).backward()

    return _update(row, weights, backward)


def _ours(row: Row, impl: str, rte: Tensor, parts: list[Tensor], weights: list[Tensor], k: int) -> tuple[Row, Run]:
    """As R2MUpdater does it: one read of every micro-batch, then products with the weights once for all sequences."""

    def backward(weights: list[Tensor]) -> None:
        w_q, w_k, w_v, w_o, head_weight, head_bias = weights
        u = rk.absorbed_query(rte, w_q, w_k)
        g = rk.reward_direction(w_v, w_o, head_weight, weight=WEIGHT)
        pooled, gradient = torch.empty_like(u), torch.empty_like(u)
        with torch.no_grad():
            rows = zip(u.chunk(len(parts)), pooled.chunk(len(parts)), gradient.chunk(len(parts)), parts, strict=True)
            for query, part_pooled, part_gradient, hidden in rows:
                pools = rk.attention_pool_with_gradient(query, hidden, g, scale=1.0, impl=impl)
                part_pooled.copy_(pools[0])
                part_gradient.copy_(pools[1])
        rewards = rk.reward_from_pools(u, g, pooled, gradient, rte, head_weight, head_bias, weight=WEIGHT)
        rk.grebt_loss(rewards.view(-1, k), alpha=ALPHA, eps=EPS, impl=impl).backward()

    return _update(row, weights, backward)


def _update(row: Row, weights: list[Tensor], backward: Callable[[list[Tensor]], None]) -> tuple[Row, Run]:
    """Gradients and AdamW's step on a copy of the weights; returns the gradients of all but the head's bias."""
    weights = [w.detach().clone().requires_grad_() for w in weights]
    trained = weights[:-1]  # a shift of all rewards means nothing to GREBT
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    row.held_bytes = sum(w.nbytes for w in weights) + 2 * sum(w.nbytes for w in trained)

    def run() -> list[Tensor]:
        backward(weights)
        optimizer.step()
        gradients = [w.grad for w in trained if w.grad is not None]
        for w in weights:
            w.grad = None
        return gradients

    return row, run
