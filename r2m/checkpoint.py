"""Saving and restoring a training run between rounds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2m.reward_model import WEIGHTS_FILE

if TYPE_CHECKING:
    from r2m.trainer import R2MTrainer


def save_checkpoint(trainer: R2MTrainer, t: int) -> Path:
    """Write `checkpoint-<t>`, everything that round t + 1 needs: the policy's trainable weights, the reward model's
    part and both optimizers. Prompts and random numbers are functions of the seed and the round, and need no saving.
    """
    folder = trainer.output_dir / f"checkpoint-{t}"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_trainable(trainer), folder / "policy.safetensors")
    trainer.reward_model.save_pretrained(folder / "reward_model")
    state = {
        "round": t,
        "rounds": trainer.config.rounds,
        "optimizer": trainer.optimizer.state_dict(),
        "updater": trainer.updater.state_dict(),
        "initial_head": trainer.initial_head.state_dict(),
    }
    torch.save(state, folder / "state.pt")
    return folder


def load_checkpoint(trainer: R2MTrainer, folder: str | Path) -> int:
    """Restore `folder` into a trainer made from the same initial policy and reward model; returns its round."""
    folder = Path(folder)
    if not (folder / "state.pt").is_file():
        raise FileNotFoundError(f"resume_from: {folder} holds no state.pt; expected a folder checkpoint-<round>")
    state = torch.load(folder / "state.pt", map_location=trainer.device, weights_only=True)
    if state["rounds"] != trainer.config.rounds:
        raise ValueError(
            f"rounds is {trainer.config.rounds}, the checkpoint's run has {state['rounds']}; w(t) depends on it"
        )
    saved, own = load_file(folder / "policy.safetensors", device=str(trainer.device)), _trainable(trainer)
    if {name: p.shape for name, p in saved.items()} != {name: p.shape for name, p in own.items()}:
        raise ValueError(f"resume_from: the trainable weights in {folder} are not those of this policy")
    for name, value in saved.items():
        own[name].copy_(value)
    weights = load_file(folder / "reward_model" / WEIGHTS_FILE, device=str(trainer.device))
    trainer.reward_model.load_state_dict(weights)
    trainer.initial_head.load_state_dict(state["initial_head"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.updater.load_state_dict(state["updater"])
    return state["round"]


def _trainable(trainer: R2MTrainer) -> dict[str, Tensor]:
    policy = trainer.accelerator.unwrap_model(trainer.policy)
    return {name: p.data for name, p in policy.named_parameters() if p.requires_grad}
