"""Which pairs of a round's responses are worth a label."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations

from r2m.data.order import round_seed

# (margin by the reward, margin without policy feedback, random numbers) -> of a prompt's pairs the one with the most
Worth = Callable[[float, float, random.Random], float]


def best_worst(margin: float, vanilla: float, rng: random.Random) -> float:
    return abs(margin)


def uncertain(margin: float, vanilla: float, rng: random.Random) -> float:
    return -abs(margin)


def disagreement(margin: float, vanilla: float, rng: random.Random) -> float:
    return abs(margin - vanilla)


def at_random(margin: float, vanilla: float, rng: random.Random) -> float:
    return rng.random()


CHOICES: dict[str, Worth] = {
    "best_worst": best_worst, "uncertain": uncertain, "disagreement": disagreement, "random": at_random,
}  # fmt: skip


def choose_pairs(
    choose: str,
    rewards: Sequence[float],
    vanilla: Sequence[float],
    texts: Sequence[str],
    *,
    group: int,
    count: int,
    seed: int,
    t: int,
) -> list[tuple[int, int]]:
    """Rows of at most `count` pairs of distinct texts: of as many prompts, drawn at random, one pair each.

    rewards, vanilla (without policy feedback), texts: of a round's responses, `group` to a prompt. Which of a pair
    comes first is random, too. A function of its arguments: the seed and the round t give the random numbers.
    """
    rng, worth = random.Random(round_seed(seed, t)), CHOICES[choose]
    starts = list(range(0, len(texts), group))
    rng.shuffle(starts)
    chosen: list[tuple[int, int]] = []
    for start in starts:
        pairs = [(i, j) for i, j in combinations(range(start, start + group), 2) if texts[i] != texts[j]]
        if pairs and len(chosen) < count:
            i, j = max(
                pairs, key=lambda ij: worth(rewards[ij[0]] - rewards[ij[1]], vanilla[ij[0]] - vanilla[ij[1]], rng)
            )
            chosen.append((i, j) if rng.random() < 0.5 else (j, i))
    return chosen
