"""What a device multiplies natively, and the precision that `precision: auto` chooses for it."""

from __future__ import annotations

import dataclasses
import logging

import torch

from r2m.config import R2MConfig
from r2m_kernels.products import cpu_multiplies_bfloat16

logger = logging.getLogger(__name__)


def native_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 natively: CUDA from compute capability 8.0, ROCm, and CPUs whose
    instructions do: on others a forward pass takes about seven times as long as in float32. A GPU that this machine
    lacks, as in an estimate for another one, is taken to do so."""
    device = torch.device(device)
    if device.type == "cpu":
        return cpu_multiplies_bfloat16()
    if device.type != "cuda":
        return False
    if (device.index or 0) >= torch.cuda.device_count():
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 where `device` multiplies it natively, else float32."""
    return torch.bfloat16 if native_bfloat16(device) else torch.float32


def policy_device(config: R2MConfig) -> torch.device:
    """Where the policy and all that trains will lie."""
    return torch.device(config.placement.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def resolve_precision(config: R2MConfig, device: torch.device | str | None = None) -> R2MConfig:
    """The config with "bf16" or "float32" in place of `precision: auto`, and a line in the log that says which and why.

    device: of the policy; None: where the config puts it. A run stores what was chosen, so that another machine
    computes as the first did.
    """
    if config.precision != "auto":
        return config
    device = policy_device(config) if device is None else device
    native = native_bfloat16(device)
    chosen = dataclasses.replace(config, precision="bf16" if native else "float32")
    logger.info(
        "precision: %s, since %s %s native bfloat16 products", chosen.precision, device, "has" if native else "lacks"
    )
    return chosen
