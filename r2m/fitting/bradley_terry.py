"""Bradley-Terry: the loss of pairs, its measures, and the fit that stops where the held-out loss is lowest."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from itertools import chain, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2m import processes
from r2m.fitting.pairs import Batches, Feedback
from r2m.method.reward_model import R2MRewardModel
from r2m.progress import track

logger = logging.getLogger(__name__)


def pair_accuracy(rewards: Tensor) -> float:
    """Share of pairs in which the chosen text scores higher; rewards [2 N], chosen first."""
    return (margins_of(rewards) > 0).float().mean().item()


@torch.no_grad()
def fused_margins(reward_model: R2MRewardModel, batches: Batches) -> Tensor:
    """Reward of the chosen less that of the rejected text, at w = Omega: [N], in the order of the batches."""
    return torch.cat([batch_margins(reward_model, batch) for batch in batches])


def batch_margins(reward_model: R2MRewardModel, batch: Feedback) -> Tensor:
    """The same of one minibatch, differentiable in the trained part (see `margins_of_all`)."""
    rewards = reward_model.score(batch.rte, batch.hidden, cu_seqlens=batch.cu_seqlens)
    return margins_of_all(rewards, batch.pairs)


def reliability(margins: Tensor) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, number of pairs) of every bin that has pairs, of ten between confidence 0.5 and 1.

    margins [N], chosen less rejected. Confidence is the Bradley-Terry probability of what the margin's sign says,
    sigmoid(|margin|). Where accuracy equals it, the probabilities can be believed; the mean distance, weighted by
    number, is the expected calibration error.
    """
    confidence, right = torch.sigmoid(margins.detach().abs()), margins > 0
    bins = ((confidence - 0.5) * 20).long().clamp_max(9)
    return [
        (confidence[bins == b].mean().item(), right[bins == b].float().mean().item(), int((bins == b).sum()))
        for b in bins.unique()
    ]


def measures(name: str, margins: Tensor) -> dict[str, float]:
    errors = (count * abs(accuracy - confidence) for confidence, accuracy, count in reliability(margins))
    return {
        f"accuracy_{name}": (margins > 0).float().mean().item(),
        f"loss_{name}": bradley_terry(margins).item(),
        f"calibration_error_{name}": sum(errors) / len(margins),
    }


def margins_of(rewards: Tensor) -> Tensor:
    chosen, rejected = rewards.chunk(2)
    return chosen - rejected


def margins_of_all(rewards: Tensor, pairs: int) -> Tensor:
    """Margins [pairs] (or [pairs, D]) of a minibatch, in the order that one process would have.

    rewards [2 n] (or [2 n, D]), chosen first: of this process's share (`processes.share`). The gradient is that of the
    share alone, so the sum over processes is the gradient that one process would have.
    """
    own = margins_of(rewards)
    everywhere = processes.gather(own.detach()).clone()
    everywhere[processes.index() :: processes.number()] = own
    return everywhere[:pairs]


def bradley_terry(margins: Tensor) -> Tensor:
    return -F.logsigmoid(margins).mean()


@torch.no_grad()
def normalize(reward_model: R2MRewardModel, rte: Tensor) -> float:
    """Mean 0 and deviation 1 for the scores at w = 1 of `rte`; returns the deviation they had."""
    scale = reward_model.vanilla_score(rte).std().item()
    reward_model.head.weight.div_(scale)
    reward_model.head.bias.sub_(reward_model.vanilla_score(rte).mean())
    return scale


def minimize(
    what: str,
    parameters: list[nn.Parameter],
    loss: Callable[[Any], Tensor],
    batches: Batches,
    held_out_loss: Callable[[], Tensor],
    learning_rate: float,
    max_epochs: int | None,
    tolerance: float,
) -> int:
    """AdamW, a batch a step, until for 20 steps or an epoch, whichever is more, the held-out loss has not fallen by
    `tolerance` of its first value; keeps and counts the best step. The held-out loss is taken four times an epoch.

    The first value is the yardstick, and not the present one: of pairs that are easy to tell apart the loss falls by
    the same share in every step, and never ends. Of several processes each has the gradient of its share of a batch
    (`margins_of_all`); they start equal, and all take the same steps.
    """
    epoch = len(batches)
    every, patience = max(1, epoch // 4), max(20, epoch)
    max_steps = max(2000, 5 * epoch) if max_epochs is None else max_epochs * epoch
    optimizer: Any = torch.optim.AdamW(parameters, lr=learning_rate)
    stream = chain.from_iterable(repeat(batches))
    best_loss, best_step, best = float("inf"), 0, []
    first, last_fall, fallen_to = 0.0, 0, float("inf")
    for step in track(range(max_steps + 1), f"fitting the {what}, step"):
        if step % every == 0 or step == max_steps:
            with torch.no_grad():
                current = processes.from_first(held_out_loss().item())  # all stop at the same step
            if not math.isfinite(current):
                raise FloatingPointError(
                    f"Bradley-Terry fit of the {what}: the held-out loss is {current}, step {step}"
                )
            if epoch > 1:
                logger.info("%s: held-out loss %.4f after %d steps, %d an epoch", what, current, step, epoch)
            if step == 0:
                first = current
            if current < best_loss:
                best_loss, best_step, best = current, step, copy.deepcopy([p.data for p in parameters])
            if current < fallen_to - tolerance * first:
                fallen_to, last_fall = current, step
            if step - last_fall >= patience:
                break
            if step == max_steps:
                if best_step == step:
                    logger.warning(
                        "Bradley-Terry fit of the %s: the held-out loss was still falling, to %.4f, after %d steps; "
                        "to go on, set max_epochs (--max-epochs) to more than %d",
                        what,
                        current,
                        step,
                        step // epoch,
                    )
                break
        optimizer.zero_grad(set_to_none=True)
        loss(next(stream)).backward()
        for p in parameters:
            if p.grad is not None:
                p.grad = processes.total(p.grad)
        optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return best_step
