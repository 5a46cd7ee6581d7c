"""Judges: scores of responses that training never sees."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r2m.data.sources import Prompt
from r2m.names import check_judge

# (prompts, responses) -> a score for each response, higher is better
Judge = Callable[[list[Prompt], list[str]], Sequence[float]]


def load_judge(name: str) -> Judge:
    """The function that "module:function" or "folder/file.py:function" names.

    Raises ValueError if the name has another form or is no function, ImportError if the module cannot be imported.
    """
    check_judge(name)
    source, _, function = name.rpartition(":")
    if source.endswith(".py"):
        spec: Any = importlib.util.spec_from_file_location(f"r2m_judge_{Path(source).stem}", source)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where its dataclasses, for one, look it up
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            raise ImportError(f"judge is {name!r}; {source} cannot be imported: {error}") from error
    judge = getattr(module, function, None)
    if not callable(judge):
        raise ValueError(f"judge is {name!r}; {source} has no function {function}")
    return judge


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
