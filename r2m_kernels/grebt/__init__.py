"""GREBT, the loss that trains the reward model's trainable part: equations 4 to 6 of R2M (arXiv 2601.22664)."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.registration import forbid_second_derivative, forbid_transforms, full_precision, save, saved

_OP = "grebt"
_REDUCTIONS = ("mean", "sum", "none")


@overload
def grebt_loss(
    rewards: Tensor,
    *,
    alpha: float = 0.3,
    pair_scores: Tensor | None = None,
    eps: float = 1e-2,
    reduction: str = "mean",
    impl: str = "auto",
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def grebt_loss(
    rewards: Tensor,
    *,
    alpha: float = 0.3,
    pair_scores: Tensor | None = None,
    eps: float = 1e-2,
    reduction: str = "mean",
    impl: str = "auto",
    return_stats: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def grebt_loss(
    rewards: Tensor,
    *,
    alpha: float = 0.3,
    pair_scores: Tensor | None = None,
    eps: float = 1e-2,
    reduction: str = "mean",
    impl: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """(1 - alpha) BT + alpha GRE of groups of K rewards. Differentiable (once) in rewards.

    rewards      [n, K], one row a group, K >= 2
    alpha        share of the group reward entropy, in [0, 1]
    pair_scores  [n, K]: the scores whose highest and lowest pick each group's pair; default: rewards. A constant.
                 Ties: the first index for the highest, the last for the lowest, so the two always differ
    eps          z = (r - mean) / (std + eps), population std, in the unit of the rewards. It bounds GRE's gradient, by
                 about 0.2 / eps: without it a nearly degenerate group outweighs all others
    reduction    over groups: "mean", "sum" or "none"

    BT = -log sigmoid(r_winner - r_loser), equation 4; GRE = -sum p log p with p = softmax(z), equation 5, in nats.
    Returns the loss, float32 (float64 for float64), 0-dim or [n]; with return_stats also a dict of constants, each
    [n]: bt, entropy, std (before eps), and the indices winner and loser (int64). A group of equal rewards, whose pair
    is tied too, has gradient exactly 0. A NaN, of rewards or pair_scores, makes its own group NaN. On a GPU, one launch
    of "triton" (K up to 1024) or "extension" gives loss, statistics and gradient, one more reduces over groups; the
    backward is one. Raises ValueError or TypeError for arguments that do not fit, RuntimeError for an `impl` that
    cannot run, for second and for forward-mode derivatives.
    """
    checks.floating(rewards=rewards)
    if rewards.ndim != 2 or rewards.shape[0] < 1 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: expected shape [n, K] with n >= 1 and K >= 2, got {list(rewards.shape)}")
    if pair_scores is None:
        pair_scores = rewards
    checks.floating(pair_scores=pair_scores)
    checks.shape("pair_scores", pair_scores, (tuple(rewards.shape), "[n, K] like rewards"))
    checks.same_device(rewards=rewards, pair_scores=pair_scores)
    for name, value, low, high in (("alpha", alpha, 0, 1), ("eps", eps, 0, float("inf"))):
        checks.number(name, value)
        if not low <= value <= high:
            raise ValueError(f"{name}: expected a value in [{low}, {high}], got {value}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {_REDUCTIONS}, got {reduction!r}")
    k = rewards.shape[1]
    # Asked only where Triton may run: torch.export of a symbolic K would keep the answer as a condition.
    names = dispatch.FASTEST_FIRST.get(rewards.device.type, ()) if impl == "auto" else (impl,)
    too_wide = f"K = {k} exceeds 1024 rewards a group" if "triton" in names and k > 1024 else None
    name = dispatch.choose(impl, rewards, op=_OP, triton=too_wide)
    forbid_transforms("grebt_loss", rewards)
    loss, *stats, _ = torch.ops.r2m_kernels.grebt_loss(
        rewards, pair_scores.detach(), float(alpha), float(eps), reduction, name
    )
    if not return_stats:
        return loss
    return loss, dict(zip(("bt", "entropy", "std", "winner", "loser"), stats, strict=True))


@torch.library.custom_op("r2m_kernels::grebt_loss", mutates_args=())
@full_precision
def _grebt_loss(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, reduction: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the statistics, and the gradient of the rewards, up to that of the loss: the forward computes both."""
    groups = dispatch.implementation(_OP, impl).grebt_loss
    group_weight = 1 / rewards.shape[0] if reduction == "mean" else 1.0
    loss, bt, entropy, std, winner, loser, gradient = groups(rewards, pair_scores, alpha, eps, group_weight)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, bt, entropy, std, winner, loser, gradient


@_grebt_loss.register_fake
def _(
    rewards: Tensor, pair_scores: Tensor, alpha: float, eps: float, reduction: str, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, dtype = rewards.shape[0], checks.accumulate_dtype(rewards)
    loss = rewards.new_empty((n,) if reduction == "none" else (), dtype=dtype)
    bt, entropy, std = (rewards.new_empty(n, dtype=dtype) for _ in range(3))
    winner, loser = (rewards.new_empty(n, dtype=torch.int64) for _ in range(2))
    return loss, bt, entropy, std, winner, loser, rewards.new_empty(rewards.shape, dtype=dtype)


@torch.library.custom_op("r2m_kernels::grebt_loss_backward", mutates_args=())
@full_precision
def _grebt_loss_backward(grad: Tensor, gradient: Tensor, rewards: Tensor) -> Tensor:
    """grad, 0-dim or [n], times gradient, in the dtype of the rewards, which are an argument also so that autograd sees
    the dependence on them that `gradient` stands for, and a second derivative raises."""
    return torch.mul(grad[..., None], gradient, out=rewards.new_empty(rewards.shape))


@_grebt_loss_backward.register_fake
def _(grad: Tensor, gradient: Tensor, rewards: Tensor) -> Tensor:
    return rewards.new_empty(rewards.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rewards, *_ = inputs
    *_, gradient = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the statistics
    save(ctx, gradient, rewards)


def _backward(ctx: Any, grad: Tensor | None, *grads_of_constants: None) -> tuple[Tensor | None, ...]:
    grad_rewards = None if grad is None else torch.ops.r2m_kernels.grebt_loss_backward(grad, *saved(ctx))
    return grad_rewards, None, None, None, None, None


_grebt_loss.register_autograd(_backward, setup_context=_setup_context)
forbid_second_derivative(_grebt_loss_backward, "grebt_loss")
