"""Policy and reward model in different processes: pools are made where hidden states are, rewards where they are not.

Of a sequence u travels to the policy, and c, V and one number travel back, however long it is (docs/verl.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from r2m.config import R2M
from r2m.data.sources import Prompt
from r2m.method.reward_model import WEIGHTS_FILE, R2MRewardModel
from r2m.method.updater import R2MUpdater
from r2m_kernels import attention_pool_with_gradient


class Pools(NamedTuple):
    """What `attention_pool_with_gradient` returns of b sequences, float32."""

    pooled: Tensor  # c [b, D_p] or [b, H, D_p]
    gradient: Tensor  # V, shape of c
    lse: Tensor  # [b] or [b, H]


def pool_packed(
    query: Tensor, direction: Tensor, hidden: Tensor, lengths: Tensor, group: dist.ProcessGroup | None = None
) -> Pools:
    """The pools of b sequences that are packed in hidden [total, D_p], each without its last position.

    query: u [b, D_p] or [b, H, D_p]; direction: g [D_p] or [H, D_p]; lengths [b]. What of `hidden` comes after the last
        sequence is not read.
    group: ranks of which each has an equal slice of the packed rows, in order; padding comes after all of them.
    """
    ends = lengths.cumsum(0)
    # A last position is a sequence of its own, whose pool is dropped: no row has to be copied.
    cu_seqlens = torch.nn.functional.pad(torch.stack([ends - 1, ends], 1).flatten(), (1, 0))
    if group is not None:
        cu_seqlens = (cu_seqlens - dist.get_rank(group) * len(hidden)).clamp(0, len(hidden))
    pools = attention_pool_with_gradient(
        query.repeat_interleave(2, 0), hidden, direction, cu_seqlens=cu_seqlens.int(), scale=1.0, group=group
    )
    return Pools(*(t[::2] for t in pools))


class RewardModel:
    """Steps 3 and 5 of a round, from pools: an `R2MUpdater` whose hidden states stay elsewhere.

    Rows are prompt-major: the K responses to a prompt follow one another. All that goes in and out is in host memory.

    path: an R2M reward model, as from `r2m fit-reward`, or a sequence-classification checkpoint; policy: the model that
        it reads. total_rounds: T. num_generations: K, at least 2. settings: `feedback` frozen or trained, with the
        policy's hidden states at all positions.

    Raises ValueError for other settings, and as `R2MRewardModel.from_pretrained` and `R2MUpdater` do.
    """

    def __init__(
        self,
        path: str | Path,
        policy: str | Path,
        total_rounds: int,
        num_generations: int,
        settings: R2M | None = None,
        device: torch.device | str = "cpu",
    ):
        settings = R2M() if settings is None else settings
        check_settings(settings, num_generations)
        self.model = R2MRewardModel.from_pretrained(
            path,
            policy=policy,
            device=device,
            inner_width=settings.inner_width,
            num_heads=settings.num_heads,
            zero_output=settings.zero_output,
            floor=settings.floor,
        )
        self.updater = R2MUpdater(self.model, settings, total_steps=total_rounds, num_generations=num_generations)
        self.device = torch.device(device)

    def begin_round(self, prompts: list[Prompt], responses: list[str], step: int) -> tuple[Tensor, Tensor]:
        """u [n * K, D_p] or [n * K, H, D_p] and g [D_p] or [H, D_p] for these texts in round `step`, 1 to T."""
        self.updater.begin_round(self.model.embed(prompts, responses), step)
        return self.updater.query.cpu(), self.updater.direction.cpu()

    def score(self, pools: Pools) -> Tensor:
        """Rewards [n * K] from the pools of the policy that sampled."""
        self._annotated = self.updater.score_pools(slice(None), pools[0].to(self.device), pools[2].to(self.device))
        return self._annotated.cpu()

    def step(self, pools: Pools) -> dict[str, float]:
        """GREBT on the pools of the policy's last epoch, one optimizer step; metrics as of `R2MUpdater.step`."""
        self.updater.collect_pools(slice(None), *(t.to(self.device) for t in pools))
        return self.updater.step(self._annotated)

    def save(self, folder: str | Path) -> None:
        """An R2M reward model with the state of its optimizer beside it."""
        self.model.save_pretrained(folder)
        torch.save(self.updater.state_dict(), Path(folder) / "optimizer.pt")

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote. Raises FileNotFoundError where that is not all there."""
        files = [Path(folder) / name for name in (WEIGHTS_FILE, "optimizer.pt")]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"the run goes on from a checkpoint without {' and '.join(missing)}; expected one that was written "
                "with R2M, or a new run"
            )
        self.model.load_state_dict(load_file(files[0], device=str(self.device)))
        self.updater.load_state_dict(torch.load(files[1], map_location=self.device, weights_only=True))


def check_settings(settings: R2M, num_generations: int) -> None:
    """Raises ValueError for what needs more than pools of the policy's hidden states at all positions."""
    expected: dict[str, tuple[Any, ...]] = {
        "feedback": ("trained", "frozen"),
        "source": ("policy",),
        "positions": ("all",),
        "standardize": (False,),
    }
    for name, values in expected.items():
        if getattr(settings, name) not in values:
            raise ValueError(
                f"r2m.{name} is {getattr(settings, name)!r}; expected {' or '.join(map(repr, values))}, where the "
                "policy runs in other processes"
            )
    if num_generations < 2:
        raise ValueError(f"num_generations is {num_generations}; expected at least 2 responses to compare")
