"""Judges: scores of responses that training never sees."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r2m.data import Prompt

# (prompts, responses) -> a score for each response, higher is better
Judge = Callable[[list[Prompt], list[str]], Sequence[float]]


def load_judge(name: str) -> Judge:
    """The function that "module:function" or "folder/file.py:function" names.

    Raises ValueError if the name has another form or is no function, ImportError if there is no such module.
    """
    source, colon, function = name.rpartition(":")
    if not colon or not function:
        raise ValueError(f"judge is {name!r}; expected 'module:function' or 'file.py:function'")
    if source.endswith(".py"):
        if not Path(source).is_file():
            raise ValueError(f"judge is {name!r}; there is no file {source}")
        spec: Any = importlib.util.spec_from_file_location(Path(source).stem, source)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(source)
    judge = getattr(module, function, None)
    if not callable(judge):
        raise ValueError(f"judge is {name!r}; {source} has no function {function}")
    return judge


def mean_score(judge: Judge, prompts: list[Prompt], responses: list[str]) -> float:
    """The judge's mean score. Raises ValueError unless it returns a finite number for each response."""
    scores = [float(score) for score in judge(prompts, responses)]
    wrong = [score for score in scores if not math.isfinite(score)]
    if len(scores) != len(responses) or wrong:
        what = f"{len(scores)} scores" if not wrong else f"a score of {wrong[0]}"
        raise ValueError(f"judge returned {what} for {len(responses)} responses; expected a finite number for each")
    return sum(scores) / len(scores)
