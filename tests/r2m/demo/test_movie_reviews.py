import random
import sys

import numpy as np
import pytest

from r2m.demo.movie_reviews import (
    PROMPT,
    Review,
    _clean,
    _windows,
    fit_judge,
    load_reviews,
    load_splits,
    vader,
)

PAIR_SPLITS = ["pairs", "validation_pairs", "test_pairs", "judge_test"]


def test_clean():
    assert _clean(" One.<br /><br />Two <i>3</i>  \x96 a &amp; b < c\n") == "One. Two 3 a & b < c"


def test_windows():
    text = " ".join(map(str, range(10)))
    assert list(_windows(text, 4, at_most=9)) == ["0 1 2 3", "4 5 6 7"]  # two words left: half a window is not enough
    assert list(_windows(text + " 10", 4, at_most=9))[2:] == ["8 9 10"]
    assert list(_windows(text, 4, at_most=1)) == ["0 1 2 3"]
    assert list(_windows("alone", 4, at_most=9)) == ["alone"]


def test_vader():
    positive, negative, neutral = vader(["A wonderful, lovely film.", "An awful, boring mess.", "It is a film."])
    assert positive > 0.5 and negative < -0.5 and neutral == 0


def test_judge_learns_words_and_ignores_the_prompt():
    draw = random.Random(0)
    words = {True: "good great fine", False: "bad awful dull"}
    reviews = [
        Review(" ".join(draw.choices((words[positive] + " the film was and").split(), k=25)), positive)
        for positive in [True, False] * 40
    ]
    judge = fit_judge(reviews)
    good, bad = judge(["a great and fine film", "a dull and awful film"])
    assert good > 0 > bad
    assert judge([f"{PROMPT} a great and fine film"])[0] == good
    assert judge(["a great and fine film", "was the film"])[0] == good  # a text's score does not depend on the others


@pytest.mark.parametrize(
    ("module", "call", "name"),
    [("sklearn", "fit_judge([])", "scikit-learn"), ("vaderSentiment", "vader(['a'])", "vaderSentiment")],
)
def test_missing_extra_is_named(monkeypatch, module, call, name):
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{name}: pip install 'r2m-kernels\[demo\]'"):
        eval(call)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from r2m.models import smollm2

    return AutoTokenizer.from_pretrained(smollm2())


@pytest.fixture(scope="module")
def splits(tokenizer):
    return load_splits(tokenizer, seed=0, num_pairs=32)


@pytest.mark.real_model
def test_reviews_are_clean_unique_and_balanced():
    reviews = load_reviews()
    assert len(reviews) == 33_404
    assert len({review.text.casefold() for review in reviews}) == len(reviews)
    assert all(review.text and "<br" not in review.text and "  " not in review.text for review in reviews)
    assert abs(np.mean([review.positive for review in reviews]) - 0.5) < 0.002


@pytest.mark.real_model
def test_splits_are_disjoint(splits):
    """Every text in a split is the opening of a review; count, for each review, the splits it appears in."""
    openings = [text for name in PAIR_SPLITS for pair in getattr(splits, name) for text in (pair.chosen, pair.rejected)]
    assert len(set(openings)) == len(openings) == 2 * (32 + 64 + 256 + 1024)
    prompts = [prompt.removeprefix(PROMPT) for prompt in splits.prompts + splits.eval_prompts]
    assert len(set(prompts)) == len(prompts) == 400 + 64
    # No review is left over and none is dealt twice.
    assert len(splits.judge_train) + len(openings) + len(prompts) == len(load_reviews())
    assert len({review.text for review in splits.judge_train}) == len(splits.judge_train)
    judged = {f" {review.text}"[:90] for review in splits.judge_train}
    assert not judged & {opening[:90] for opening in openings}


@pytest.mark.real_model
def test_windows_are_as_long_as_generations(splits, tokenizer):
    def tokens(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    for name in PAIR_SPLITS:
        for pair in getattr(splits, name):
            assert pair.prompt == PROMPT
            for completion in (pair.chosen, pair.rejected):
                assert completion.startswith(" ")
                assert len(tokens(completion)) == 40
                assert tokens(pair.prompt) + tokens(completion) == tokens(pair.prompt + completion)
    assert {len(tokens(prompt)) for prompt in splits.prompts + splits.eval_prompts} == {len(tokens(PROMPT)) + 8}


@pytest.mark.real_model
@pytest.mark.slow
def test_splits_depend_on_the_seed_and_fixed_ones_not_on_num_pairs(splits, tokenizer):
    more = load_splits(tokenizer, seed=0, num_pairs=33)
    assert more.pairs[:32] == splits.pairs and len(more.pairs) == 33
    for name in ["validation_pairs", "test_pairs", "judge_test", "prompts", "eval_prompts"]:
        assert getattr(more, name) == getattr(splits, name)
    other = load_splits(tokenizer, seed=1)
    assert set(other.prompts) != set(splits.prompts)
    assert other.test_pairs != splits.test_pairs


@pytest.mark.real_model
@pytest.mark.slow
def test_judge_on_held_out_pairs(splits):
    def accuracy(scorer):
        chosen = scorer([pair.prompt + pair.chosen for pair in pairs])
        return np.mean(chosen > scorer([pair.prompt + pair.rejected for pair in pairs]))

    pairs = splits.judge_test
    judge = fit_judge(splits.judge_train)
    assert accuracy(judge) > 0.84  # 0.85 to 0.88 over seeds
    assert 0.6 < accuracy(vader) < 0.8
    logits = judge([pair.prompt + pair.chosen for pair in pairs])
    assert logits.shape == (1024,) and np.isfinite(logits).all()
