"""Judges: scores of responses that training never sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from r2m.data.sources import Prompt

# (prompts, responses) -> a score for each response, higher is better. Named in a config: `r2m.names.load_function`.
Judge = Callable[[list[Prompt], list[str]], Sequence[float]]


def judge_scores(judge: Judge, prompts: list[Prompt], responses: list[str]) -> list[float]:
    """The judge's scores. Raises ValueError unless it returns a finite number for each response."""
    returned = judge(prompts, responses)
    try:
        scores = [float(score) for score in returned]
    except (TypeError, ValueError):
        raise ValueError(f"judge returned {returned!r:.80}; expected a finite number for each response") from None
    wrong = [score for score in scores if not math.isfinite(score)]
    if len(scores) != len(responses) or wrong:
        what = f"{len(scores)} scores" if not wrong else f"a score of {wrong[0]}"
        raise ValueError(f"judge returned {what} for {len(responses)} responses; expected a finite number for each")
    return scores


def mean_score(judge: Judge, prompts: list[Prompt], responses: list[str]) -> float:
    """The mean of `judge_scores`, with its errors."""
    scores = judge_scores(judge, prompts, responses)
    return sum(scores) / len(scores)
