"""`r2m bench`: the benchmarks of r2m_kernels at the widths of a user's models."""

from __future__ import annotations

from typing import Any

from r2m.method.backbone import hidden_width
from r2m.method.reward_model import saved_config
from r2m.models import shown
from r2m.names import check_model, named
from r2m_kernels.bench import bench_shape, check_shape

PAPER_WIDTH = 4096  # of Llama-3-8B and of Skywork-Reward-V2-Llama-3.1-8B


def bench_models(policy: str | None, reward_model: str | None, **options: Any) -> None:
    """bench_shape at the hidden sizes of two models, hub ids or folders, or at PAPER_WIDTH where there is none.

    Raises ValueError for an argument that does not fit, OSError for a model that cannot be found.
    """
    check_shape(**{key: options[key] for key in ("batch", "inner_width", "heads", "responses", "dtype", "device")})
    widths = _hidden_size("policy", policy), _hidden_size("reward_model", reward_model)
    bench_shape(str(shown(policy or "default widths")), *widths, **options)


def _hidden_size(argument: str, name: str | None) -> int:
    """Of a model's config; of a saved R2M reward model, its backbone's."""
    if name is None:
        return PAPER_WIDTH
    named(argument, check_model, name)
    saved = saved_config(name)
    if saved is not None:
        return hidden_width(saved.backbone, saved.backbone_revision, trust_remote_code=False)
    return hidden_width(name, None, trust_remote_code=False)
