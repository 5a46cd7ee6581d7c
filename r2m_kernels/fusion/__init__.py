"""Time-weighted fusion and the reward: equations 2 and 3 of R2M (arXiv 2601.22664)."""

import math

from torch import Tensor

from r2m_kernels import checks, dispatch
from r2m_kernels.fusion import ops
from r2m_kernels.registration import forbid_transforms


def time_weight(step: int, total_steps: int, floor: float) -> float:
    """w(t) = max(cos(pi t / T) / 2 + 1/2, floor), equation 2: the weight of the vanilla embedding in round t = step.

    step counts training rounds, 1 to T = total_steps; floor is the paper's Omega, in [0, 1] (0.6 or 0.7 there). Raises
    ValueError outside these ranges, TypeError for counts that are not ints.
    """
    for name, value in (("step", step), ("total_steps", total_steps)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    checks.number("floor", floor)
    if not 1 <= step <= total_steps:
        raise ValueError(f"step: expected 1 <= step <= total_steps = {total_steps}, got {step}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: expected a value in [0, 1], got {floor}")
    return max(math.cos(math.pi * step / total_steps) / 2 + 0.5, float(floor))


def time_weighted_fusion(aggregated: Tensor, rte: Tensor, weight: float | Tensor, *, impl: str = "auto") -> Tensor:
    """F = (1 - w) A + w H, equation 2. Differentiable (once) in A and H.

    aggregated A and rte H [B, D_rm], weight w a float or a constant 0-dim tensor -> [B, D_rm] in the promoted dtype.
    On a GPU "triton" and "extension" take one launch forward, one backward.
    Raises ValueError or TypeError for arguments that do not fit, RuntimeError for an `impl` that cannot run.
    """
    checks.floating(aggregated=aggregated, rte=rte)
    _check_embeddings(aggregated, rte)
    name = dispatch.choose(impl, rte, op=ops.OP)
    forbid_transforms("time_weighted_fusion", aggregated, rte)
    w = checks.fusion_weight(weight, rte)
    return ops.time_weighted_fusion(aggregated, rte, w, name)


def fused_reward(
    aggregated: Tensor,
    rte: Tensor,
    weight: float | Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """r = phi . ((1 - w) A + w H) + b, equations 2 and 3 in one. Differentiable (once) in A, H, phi and b.

    aggregated A and rte H [B, D_rm], weight w a float or a constant 0-dim tensor, head_weight phi [D_rm] or [1, D_rm],
    head_bias a tensor of one element -> float32 [B] (float64 for float64). At w = 1 it is the vanilla reward
    phi . H + b. On a GPU "triton" and "extension" take one launch forward and two backward: sums over blocks of rows,
    then over the blocks. Raises ValueError or TypeError for arguments that do not fit, RuntimeError for an `impl` that
    cannot run.
    """
    given = checks.given("head_bias", head_bias)
    checks.floating(aggregated=aggregated, rte=rte, head_weight=head_weight, **given)
    _check_embeddings(aggregated, rte)
    phi, bias = checks.head(rte.shape[1], head_weight, head_bias)
    name = dispatch.choose(impl, rte, op=ops.OP)
    forbid_transforms("fused_reward", aggregated, rte, phi, bias)
    w = checks.fusion_weight(weight, rte)
    return ops.fused_reward(aggregated, rte, w, phi, bias, name)


def _check_embeddings(aggregated: Tensor, rte: Tensor) -> None:
    checks.dimensions("rte", rte, "[B, D_rm]")
    checks.shape("aggregated", aggregated, (tuple(rte.shape), "[B, D_rm] like rte"))
