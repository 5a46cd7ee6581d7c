"""Estimates with standard errors, by the jackknife, and coefficients of correlation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

JACKKNIFE_GROUPS = 20


class Estimate(NamedTuple):
    value: float
    error: float  # standard error

    def __str__(self) -> str:
        """To the second digit of the error."""
        decimals = max(0, 1 - math.floor(math.log10(self.error))) if self.error > 0 else 3
        return f"{self.value:.{decimals}f} ± {self.error:.{decimals}f}"

    def is_above(self, value: float) -> bool:
        """By more than two standard errors."""
        return self.value - 2 * self.error > value

    def is_below(self, value: float) -> bool:
        """By more than two standard errors."""
        return self.value + 2 * self.error < value


def jackknife(statistic: Callable[[Tensor], Tensor], count: int) -> list[Estimate]:
    """A statistic of `count` pairs, [M] values, and their standard errors by leaving out a twentieth of them in turn.

    statistic: indices of the pairs that it may use, int64 [n] -> float [M]. It holds for means, and for statistics over
    pairs of texts, which are not independent of each other, too.
    """
    number = torch.arange(count)
    groups = min(JACKKNIFE_GROUPS, count)
    value = statistic(number)
    left_out = torch.stack([statistic(number[number % groups != g]) for g in range(groups)])
    error = ((groups - 1) * (left_out - left_out.mean(0)).square().mean(0)).sqrt()
    return [Estimate(v, e) for v, e in zip(value.tolist(), error.tolist(), strict=True)]


def pearson(x: Tensor, y: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([x.double(), y.double()]))[0, 1]


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's of the ranks; equal values share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def kendall(x: Tensor, y: Tensor) -> Tensor:
    """Kendall's tau-b. Time and memory grow with N^2."""
    x_order, y_order = (x[:, None] - x).sign(), (y[:, None] - y).sign()
    return (x_order * y_order).sum() / (x_order.abs().sum() * y_order.abs().sum()).sqrt()


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]
