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
    """Rows of at most `count` pairs of distinct texts: one of each prompt, in random order; where that is too few, a
    second one of each, and so on. No response is in two pairs.

    rewards, vanilla (without policy feedback), texts: of a round's responses, `group` to a prompt. Which of a pair
    comes first is random, too. A function of its arguments: the seed and the round t give the random numbers.
    """
    rng, worth = random.Random(round_seed(seed, t)), CHOICES[choose]
    starts = list(range(0, len(texts), group))
    rng.shuffle(starts)
    left = {start: list(range(start, start + group)) for start in starts}
    chosen: list[tuple[int, int]] = []
    for start in starts * (group // 2):
        pairs = [(i, j) for i, j in combinations(left[start], 2) if texts[i] != texts[j]]
        if pairs and len(chosen) < count:
            i, j = max(
                pairs, key=lambda ij: worth(rewards[ij[0]] - rewards[ij[1]], vanilla[ij[0]] - vanilla[ij[1]], rng)
            )
            left[start] = [row for row in left[start] if row not in (i, j)]
            chosen.append((i, j) if rng.random() < 0.5 else (j, i))
    return chosen
