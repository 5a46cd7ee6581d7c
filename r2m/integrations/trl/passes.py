"""What TRL's passes of the policy are: whole sequences, and how many of them a rollout has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from r2m.data.sources import Prompt

Tokens = tuple[int, ...]  # token ids of prompt and completion, without padding


class Pass(NamedTuple):
    """One forward pass of the policy over whole sequences."""

    sequences: list[Tokens]
    hidden: Tensor  # [b, S, D_p]
    mask: Tensor  # bool [b, S], True where there is a token


@dataclass
class Rollout:
    """Sequences that have their rewards, on their way through the policy's training passes."""

    t: int
    prompts: list[Prompt]
    texts: list[str]  # completions as the reward model reads them
    rewards: Tensor  # [B]
    initial: Tensor  # [B], by the reward model's head as it came
    passes: int  # that each sequence will make
    rows: dict[Tokens, list[int]]  # several where the policy has sampled the same text again
    skipped: list[int]  # leading tokens of each row that are no feedback
    seen: Counter[Tokens] = field(default_factory=Counter)

    def row_of(self, sequence: Tokens) -> int:
        """Equal sequences take their rows in turn."""
        if sequence not in self.rows:
            raise RuntimeError(
                f"rollout {self.t}: the policy trains on a sequence that was not rewarded ({len(sequence)} tokens, of "
                f"which the first are {list(sequence[:8])}); expected prompt and completion as TRL tokenises them"
            )
        rows = self.rows[sequence]
        row = rows[self.seen[sequence] % len(rows)]
        self.seen[sequence] += 1
        return row

    @property
    def is_complete(self) -> bool:
        return self.seen.total() == len(self.skipped) * self.passes


def passes_a_rollout(args: Any) -> int:
    """Micro-batches that a process trains on between two generations."""
    return args.steps_per_generation * args.num_iterations


def micro_batches(steps: int, accumulated: int, epoch: int | None) -> int:
    """Micro-batches of the first `steps` optimizer steps, of `accumulated` each. The last step of an epoch, of `epoch`
    micro-batches, takes what is left of it; None: the epoch has no end."""
    if not epoch:
        return steps * accumulated
    epochs, rest = divmod(steps, -(-epoch // accumulated))
    return epochs * epoch + rest * accumulated


def sequences_of(ids: Tensor, mask: Tensor) -> list[Tokens]:
    """Of ids [b, S] those where mask [b, S] is True. One transfer to the host a micro-batch."""
    return [tuple(row[kept].tolist()) for row, kept in zip(ids.cpu(), mask.cpu(), strict=True)]


def length_of_prompt(sequence: Tokens, completion: list[int]) -> int:
    length = len(sequence) - len(completion)
    if length < 0 or sequence[length:] != tuple(completion):
        raise RuntimeError(
            f"the policy ran over a sequence that ends in {list(sequence[-8:])}, and the completion to be rewarded in "
            f"{completion[-8:]}; expected the trainer's scoring pass, in the order of the completions"
        )
    return length


def feedback_mask(mask: Tensor, skipped: list[int]) -> Tensor:
    """mask bool [b, S] of tokens -> of policy feedback: neither the first `skipped` of a row, nor its last, from which
    no prediction was made."""
    place = mask.cumsum(1)  # from 1
    start = torch.tensor(skipped, device=mask.device)[:, None]
    return mask & (place > start) & (place < place[:, -1:])
