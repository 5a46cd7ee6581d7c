"""What a round takes, and in which order: functions of the seed and the round alone, so that nothing of it is saved."""

from __future__ import annotations

import torch


def round_seed(seed: int, t: int) -> int:
    """A round's random numbers depend on nothing before it."""
    return seed * 1_000_003 + t


def prompts_of_round(size: int, count: int, seed: int, t: int) -> list[int]:
    """The t-th `count` of an endless sequence of shuffled passes over `size` prompts; t in 1..T."""
    order: dict[int, list[int]] = {}
    picked = []
    for i in range((t - 1) * count, t * count):
        if i // size not in order:
            generator = torch.Generator().manual_seed(round_seed(seed, i // size))
            order[i // size] = torch.randperm(size, generator=generator).tolist()
        picked.append(order[i // size][i % size])
    return picked


def minibatch_order(count: int, seed: int, t: int, epoch: int) -> list[int]:
    """A permutation of a round's minibatches for each of its epochs 1, 2, ...; the same one in all processes."""
    generator = torch.Generator().manual_seed(round_seed(seed, t))
    *_, order = (torch.randperm(count, generator=generator) for _ in range(epoch))
    return order.tolist()
