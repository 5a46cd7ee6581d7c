"""Judges: how they are named, and what they may return."""

import math

import pytest
import torch

from r2m.names import load_function
from r2m.runs.judge import judge_scores, mean_score

JUDGE = """
from __future__ import annotations
from dataclasses import dataclass

LIMIT = 3

@dataclass
class Verdict:
    score: float

def judge(prompts, responses):
    return [Verdict(float(min(len(text), LIMIT))).score for text in responses]
"""


@pytest.fixture
def judge_file(tmp_path):
    file = tmp_path / "my judge.py"
    file.write_text(JUDGE)
    return file


def test_a_judge_is_a_function_of_a_file(judge_file):
    assert load_function("judge", f"{judge_file}:judge")(["a", "b"], ["xy", "long"]) == [2.0, 3.0]


def test_a_judge_is_a_function_of_a_module(tmp_path, monkeypatch):
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "short.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("judge", "judges.short:judge")(["a"], ["long"]) == [3.0]
    assert load_function("judge", "math:dist") is math.dist


@pytest.mark.parametrize("name", ["judge", "math.dist", ":judge", "math:", "some/file.py"])
def test_a_name_of_another_form_is_an_error(name):
    with pytest.raises(ValueError, match=r"judge is .*; expected 'module:function' or 'file.py:function'"):
        load_function("judge", name)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere/none.py:judge", ValueError, "judge is 'nowhere/none.py:judge'; there is no file nowhere/none.py"),
        ("{file}:juge", ValueError, "has no function juge"),
        ("{file}:LIMIT", ValueError, "has no function LIMIT"),
        ("math:juge", ValueError, "judge is 'math:juge'; math has no function juge"),
        (
            "no_such_module:judge",
            ImportError,
            "judge is 'no_such_module:judge'; no_such_module cannot be imported: ",
        ),
    ],
)
def test_a_judge_that_is_not_there_is_named(judge_file, name, error, message):
    with pytest.raises(error, match=message):
        load_function("judge", name.format(file=judge_file))


def test_a_judge_with_a_mistake_inside_keeps_its_own_error(judge_file):
    judge_file.write_text("import math\nlimit = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_function("judge", f"{judge_file}:judge")


@pytest.mark.parametrize("scores", [[1, 2.5], (1, 2.5), torch.tensor([1, 2.5]), [torch.tensor(1), torch.tensor([2.5])]])
def test_scores_may_be_any_sequence_of_numbers(scores):
    assert judge_scores(lambda *_: scores, ["a", "b"], ["c", "d"]) == [1.0, 2.5]
    assert mean_score(lambda *_: scores, ["a", "b"], ["c", "d"]) == 1.75


@pytest.mark.parametrize(
    ("scores", "what"),
    [
        ([1.0], "returned 1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 responses"),
        ([], "returned 0 scores for 2 responses"),
        ([1.0, math.nan], "returned a score of nan for 2 responses"),
        ([-math.inf, 1.0], "returned a score of -inf for 2 responses"),
        ([1.0, None], r"returned \[1.0, None\]"),
        (["good", "bad"], r"returned \['good', 'bad'\]"),
        (None, "returned None"),
        (0.5, "returned 0.5"),
    ],
)
def test_anything_but_a_finite_number_for_each_response_is_an_error(scores, what):
    with pytest.raises(ValueError, match=f"judge {what}.*; expected a finite number for each"):
        mean_score(lambda *_: scores, ["a", "b"], ["c", "d"])


def test_an_error_of_the_judge_is_its_own():
    def judge(prompts, responses):
        raise TypeError("my own")

    with pytest.raises(TypeError, match="my own"):
        mean_score(judge, ["a"], ["b"])
