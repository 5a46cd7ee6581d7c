"""GREBT, the loss that trains the reward model's trainable part: equations 4 to 6 of R2M (arXiv 2601.22664)."""

from typing import Literal, overload

from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.grebt import ops
from r2m_kernels.registration import forbid_transforms

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
    else:
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
    name = dispatch.choose(impl, rewards, op=ops.OP, triton=too_wide)
    forbid_transforms("grebt_loss", rewards)
    loss, statistics, pair, _ = ops.grebt_loss(
        rewards, checks.constant(pair_scores), float(alpha), float(eps), reduction, name
    )
    if not return_stats:
        return loss
    return loss, dict(zip(("bt", "entropy", "std", "winner", "loser"), (*statistics, *pair), strict=True))
