"""Gold: its parts by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from r2m.demo import gold

TEXTS = ["the film was good", "the film was bad , the film was long", "a good film"]


def test_trigrams_against_witten_bell_by_hand():
    model = gold.Trigrams(TEXTS)
    read = [["<", "<", *text.split()] for text in TEXTS]
    base = len({word for text in TEXTS for word in text.split()}) + 2

    def probability(history, word):
        """Of a word after one, two or no words."""
        lower = probability(history[1:], word) if history else 1 / base
        size = len(history)
        followers = Counter(
            text[i] for text in read for i in range(2, len(text)) if tuple(text[i - size : i]) == history
        )
        if not followers:
            return lower
        return (followers[word] + len(followers) * lower) / (followers.total() + len(followers))

    text = ["the", "film", "was", "unheard", "of", ",", "good", "film"]
    padded = ["<", "<", *text]
    expected = [math.log(probability(tuple(padded[i - 2 : i]), padded[i])) for i in range(2, len(padded))]
    assert model.mean_log_probability(" ".join(text), 0) == pytest.approx(np.mean(expected))
    assert model.mean_log_probability(" ".join(text), 5) == pytest.approx(np.mean(expected[5:]))


def test_gold_falls_with_repetition_and_reads_no_prompt():
    judges = gold.Judges(lambda texts: np.zeros(len(texts)), gold.Trigrams(TEXTS))
    parts = judges.parts(["Movie review: the film"] * 2, [" was good", " was was was\nwas"])
    assert parts[0, 2] == 1.0 and parts[1, 2] == pytest.approx(1 / 3)
    assert parts[0, 1] > parts[1, 1]
    assert parts[0, 1] == pytest.approx(judges.trigrams.mean_log_probability("the film was good", 2))


def test_standard_is_of_deviations_inside_prompts():
    parts = np.random.default_rng(0).normal(size=(5, 8, 3)) + 100 * np.arange(5)[:, None, None]
    found = gold.standard(parts)
    np.testing.assert_allclose(found.deviation**2, parts.var(1, ddof=1).mean(0))
    far = found.mean + 100 * found.deviation
    assert found(far).tolist() == [gold.CLIP] * 3 and gold.gold(found(far)) == pytest.approx(gold.CLIP * 3**0.5)
